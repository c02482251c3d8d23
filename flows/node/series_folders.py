"""Folders of series that arrive over the network: hidden while they arrive, then a scan of the inbox.

    INBOX/.incoming/dicom-PSEUDONYM/SLICE.dcm    while slices arrive
    INBOX/dicom-PSEUDONYM/SLICE.dcm              the complete series

Names are digests of UIDs, keyed with this machine's secret. So a slice that is sent again has the same name, and no
name tells whose scan it is. A slice is on the disk before it is confirmed. After a kill nothing is lost: folders
that were arriving are taken up, and half-written files are removed, which their sender sends again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flows.privacy.case_ids import keyed_digest
from medad.base.errors import ConfigError
from medad.base.storage import sync_path, write_bytes

INCOMING, LOCK = ".incoming", "node.lock"
_NAME_CHARACTERS = 16
FREE_BYTES = 1 << 30
"""Space that stays free on the disk."""


class NoSpaceError(Exception):
    """The series that are arriving have reached their limit, or the disk is nearly full."""


@dataclass
class _Arriving:
    """A series that is arriving."""

    last: float
    """Time of its last slice, by the monotonic clock."""
    senders: set[object] = field(default_factory=set)
    """Associations that have sent slices of it and are still open. Until they end, it is not complete."""


class SeriesFolders:
    """The series in an inbox that are arriving. Safe for several threads; one process at a time has an inbox."""

    def __init__(self, inbox: Path, *, complete_s: float, max_bytes: float) -> None:
        self.inbox, self.incoming = inbox, inbox / INCOMING
        self.complete_s, self.max_bytes = complete_s, max_bytes
        self._arriving: dict[str, _Arriving] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Take up series that were arriving when an earlier process ended, and hold the inbox's lock.

        Raises
        ------
        ConfigError
            Another process receives into this inbox, or the folder cannot be written to.
        """
        try:
            self.incoming.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.incoming / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{self.inbox}: cannot be written to ({error.strerror})") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"{self.inbox}: another `adflows liver listen` receives into this inbox") from error
            now = time.monotonic()
            for folder in sorted(path for path in self.incoming.iterdir() if path.is_dir()):
                for unfinished in folder.glob(".*"):
                    unfinished.unlink()
                self._bytes += sum(file.stat().st_size for file in folder.iterdir())
                self._arriving[folder.name] = _Arriving(now)
            yield
        finally:
            os.close(descriptor)

    def store(self, study: str, series: str, instance: str, content: bytes, sender: object) -> None:
        """Write a slice, as it was sent. It is on the disk when this returns.

        Raises
        ------
        NoSpaceError
            The space is used up.
        OSError, DiskFullError
            It cannot be written.
        """
        name, file = _pseudonym(f"{study} {series}"), f"{_pseudonym(instance)}.dcm"
        folder = self.incoming / f"dicom-{name}"
        with self._lock:
            free = shutil.disk_usage(self.incoming).free
            if self._bytes + len(content) > self.max_bytes or free - len(content) < FREE_BYTES:
                raise NoSpaceError
            arriving = self._arriving.setdefault(folder.name, _Arriving(0.0))
            arriving.last = time.monotonic()
            arriving.senders.add(sender)
            folder.mkdir(exist_ok=True)
            known = folder / file
            self._bytes += len(content) - (known.stat().st_size if known.exists() else 0)
        write_bytes(folder / file, content)
        with self._lock:
            arriving.last = time.monotonic()

    def end(self, sender: object) -> None:
        """Note that an association has ended."""
        with self._lock:
            for arriving in self._arriving.values():
                arriving.senders.discard(sender)

    def deliver(self) -> list[tuple[str, int]]:
        """Move complete series into the inbox. Return name and number of slices of each.

        If slices of a series come later, they join those in the inbox, and the inbox sees that the scan has changed.
        """
        now = time.monotonic()
        with self._lock:
            complete = [
                name for name, each in self._arriving.items() if not each.senders and now - each.last >= self.complete_s
            ]
            found = [(name, self._move(name)) for name in complete]
            for name in complete:
                del self._arriving[name]
        return [(name, count) for name, count in found if count]

    def _move(self, name: str) -> int:
        """Move a series into the inbox and return its number of new slices."""
        folder, final = self.incoming / name, self.inbox / name
        files = sorted(folder.glob("*.dcm"))
        self._bytes -= sum(file.stat().st_size for file in files)
        if not final.exists():
            if files:
                folder.rename(final)
                sync_path(self.inbox)
            return len(files)
        new = 0
        for file in files:
            there = final / file.name
            if there.is_file() and there.read_bytes() == file.read_bytes():
                file.unlink()  # it was sent again
                continue
            file.replace(there)
            new += 1
        sync_path(final)
        folder.rmdir()
        return new


def _pseudonym(uids: str) -> str:
    return keyed_digest(f"uid {uids}")[:_NAME_CHARACTERS]
