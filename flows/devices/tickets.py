"""Tickets: the queue for locks, such as those of devices, first come, first served, between processes and users.

Each step that waits for a lock, or has one, holds one ticket. A run that waits for another run holds one too. A ticket
is a small file that its step has locked with flock, in `queue` beside the locks. Its name begins with the time at which
the step asked. Its content names the run. The kernel frees the lock when the last process of the step dies, and a
ticket without a lock does not count.

All users of the machine can read tickets, so they contain no path and no patient data. The user is the file's owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flows.machine.environment import user_name
from flows.machine.locks import try_lock

QUEUE = "queue"
"""Name of the folder of tickets, below the folder of the locks."""
READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
MAX_BYTES = 4096
"""Number of bytes of a ticket that are read. Another user can put any file into the folder."""


@dataclass(frozen=True)
class Entry:
    """The content of a ticket."""

    run: str
    """Name of the run that asks."""
    wants: tuple[str, ...]
    """Names of the locks of which the step wants one."""
    pids: tuple[int, ...]
    """Process of the run, and of its step if it has a separate one."""
    has: str = ""
    """Name of the lock that the step has. Empty: it waits."""
    since: float = 0.0
    """Time at which it asked, or got the lock, in seconds since 1970."""
    user: str = ""
    """Name of the owner of the ticket's file. It is not in the file."""

    @property
    def stopped(self) -> int | None:
        """Return the id of a process of the step that is stopped, as by Ctrl-Z. None: there is none."""
        return next((pid for pid in self.pids if _state_of(pid) in {"T", "t"}), None)


class Ticket:
    """A ticket of this process. It is valid while any process has its descriptor open."""

    def __init__(self, folder: Path, entry: Entry) -> None:
        self.entry = entry
        queue = folder / QUEUE
        for each in (folder, queue):
            shared_folder(each)
        # the clock runs at the same pace in all processes and is never set back
        self.path = queue / f"{time.monotonic_ns():020}-{os.getpid()}-{secrets.token_hex(4)}"
        self.descriptor = _locked_file(self.path)
        self._write()

    def got(self, lock: str) -> None:
        """Record that the step has a lock now."""
        self.entry = replace(self.entry, has=lock, since=time.time())
        self._write()

    def add_process(self, pid: int) -> None:
        """Record the process that computes the step."""
        self.entry = replace(self.entry, pids=(*self.entry.pids[:1], pid))
        self._write()

    def waiting_ahead(self, lock: str) -> int:
        """Return how many steps that asked earlier wait for a lock."""
        earlier = (_read(path, clean=True) for path in self.path.parent.iterdir() if path.name < self.path.name)
        return sum(entry is not None and lock in entry.wants and not entry.has for entry in earlier)

    def close(self) -> None:
        """Give the ticket back. Copies of the descriptor in other processes keep it valid."""
        os.close(self.descriptor)
        _read(self.path, clean=True)

    def _write(self) -> None:
        values = asdict(self.entry)
        del values["user"]
        text = json.dumps(values).encode()
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))


def shared_folder(folder: Path) -> None:
    """Make a folder in which all users can create files, and each can remove only his own."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            folder.chmod(0o1777)


def shared_file(path: Path) -> int:
    """Create a file that all users can read and lock, with any umask. Return its descriptor, open for writing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    os.fchmod(descriptor, 0o644)
    return descriptor


def _locked_file(path: Path) -> int:
    """Create and lock a file. Another process may remove it before it is locked, so check that and try again."""
    while True:
        descriptor = shared_file(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether some process holds the lock of a file. A file that cannot be opened counts as not locked."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, READ)
        try:
            return not try_lock(descriptor, shared=True)
        finally:
            os.close(descriptor)
    return False


def _read(path: Path, *, clean: bool) -> Entry | None:
    """Return what a ticket says. None: it is not valid, or another user put something else here.

    `clean`: remove a ticket that is not valid, where this user may.
    """
    try:
        descriptor = os.open(path, READ)
    except OSError:
        return None
    try:
        if try_lock(descriptor, shared=True):
            if clean:
                path.unlink()
            return None
        status = os.fstat(descriptor)
        values = json.loads(os.read(descriptor, MAX_BYTES))
        return Entry(
            run="".join(filter(str.isprintable, values["run"])),
            wants=tuple(map(str, values["wants"])),
            pids=tuple(map(int, values["pids"])),
            has=str(values["has"]),
            since=float(values["since"]),
            user=user_name(status.st_uid),
        )
    except (OSError, ValueError, TypeError, LookupError):
        return None
    finally:
        os.close(descriptor)


def read_queue(folder: Path) -> list[Entry]:
    """Return all valid tickets, the oldest first. This changes nothing."""
    queue = folder / QUEUE
    if not queue.is_dir():
        return []
    return [entry for path in sorted(queue.iterdir()) if (entry := _read(path, clean=False)) is not None]


def owner_of_lock(path: Path) -> Entry | None:
    """Return who holds a lock without a ticket, as far as the kernel says. Only the process and user are known."""
    with contextlib.suppress(OSError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                pid = int(fields[4])
                return Entry("", (), (pid,), path.stem, user=user_name(Path(f"/proc/{pid}").stat().st_uid))
    return None


def _state_of(pid: int) -> str:
    """Return the state of a process as /proc shows it, for example `S` or `T`. Empty: the process does not exist."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return ""
