"""Locks for which steps and runs queue, first come, first served. Each lock is a file that its holder locks with flock.

The lock files are empty and stay. Those who wait, and the holder, have tickets beside them (`flows.devices.tickets`).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.devices.tickets import READ, Entry, Ticket, is_locked, owner_of_lock, read_queue, shared_file, shared_folder
from flows.machine.locks import try_lock
from flows.machine.stopping import StoppedError, stopping
from medad.base.errors import ConfigError, LimitError

POLL_S = 0.05
NOTICE_S = 5.0
"""Waiting time after which a waiter says what it waits for."""
REPEAT_S = 600.0
"""Shortest time between two such lines of one waiter. The second one follows only if the holder has changed."""
PATIENCE_S = 2.0
"""Time for which a waiter may leave a free lock unused. A stopped process must not block those behind it."""


@dataclass(frozen=True)
class Held:
    """A lock that this process has, the descriptor that keeps it, and the ticket that says so."""

    name: str
    descriptor: int
    ticket: Ticket


@dataclass(frozen=True)
class LockQueue:
    """The locks of one folder."""

    folder: Path
    variable: str
    """Environment variable that sets the folder, for a message."""
    poll_s: float = POLL_S
    """Time between two attempts of a waiter, much shorter than `PATIENCE_S`."""

    def path(self, name: str) -> Path:
        """Return the lock file of a name."""
        return self.folder / f"{name}.lock"

    def is_taken(self, name: str) -> bool:
        """Return whether somebody has a lock."""
        return is_locked(self.path(name))

    def holder(self, name: str, queue: list[Entry] | None = None) -> Entry | None:
        """Return who has a lock, from the tickets or else from the kernel.

        None: nobody, or it cannot be found out.
        """
        if not self.is_taken(name):
            return None
        entries = read_queue(self.folder) if queue is None else queue
        return next((entry for entry in entries if entry.has == name), None) or owner_of_lock(self.path(name))

    def holder_text(self, name: str, holder: Entry | None, what: str = "it") -> str:
        """Return in a few words who has a lock. `what` names it in the sentence."""
        if holder is None:
            return f"an unknown program has the lock {self.path(name)}"
        if not holder.run:
            return f"process {holder.pids[0]} of user {holder.user} has the lock {self.path(name)}"
        stopped = f"; its process {holder.stopped} is stopped" if holder.stopped is not None else ""
        return f"run {holder.run} of user {holder.user} has {what} since {clock_text(holder.since)}{stopped}"

    @contextlib.contextmanager
    def lock(
        self,
        wants: Sequence[str],
        *,
        run: str,
        what: str,
        limit_h: float = math.inf,
        on_wait: Callable[[str], None] = lambda line: None,
    ) -> Iterator[Held]:
        """Wait for one of the locks `wants`, and hold it inside the `with` block.

        Parameters
        ----------
        run
            Name of the run, which all users of this machine can read.
        what
            Name of the locks in the line about the wait.
        limit_h
            Limit of the waiting time in hours.
        on_wait
            Function that shows one line about the wait, if it is long.

        Raises
        ------
        ConfigError
            The folder of locks cannot be used.
        LimitError
            The wait was longer than its limit.
        StoppedError
            The flow was cancelled or interrupted.
        """
        entry = Entry(run or "without a name", tuple(wants), (os.getpid(),), since=time.time())
        try:
            # one entry of the queue per thread: several steps of one run wait like those of several runs
            ticket = Ticket(self.folder, entry)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            held = _Wait(self, ticket, what).until_held(limit_h, on_wait)
            try:
                ticket.got(held.name)
                yield held
            finally:
                os.close(held.descriptor)
        finally:
            ticket.close()

    def try_lock(self, name: str) -> int | None:
        """Return the descriptor of a lock if it is free. Raises ConfigError."""
        try:
            descriptor = self._open(name)
            try:
                if try_lock(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        except OSError as error:
            raise self._unusable(error) from error
        return None

    def _open(self, name: str) -> int:
        """Open the lock file for reading. That is enough to lock it, and other users are allowed to."""
        path = self.path(name)
        shared_folder(path.parent)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, READ)
        with contextlib.suppress(FileExistsError):
            os.close(shared_file(path))
        return os.open(path, READ)

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.folder}: locks cannot be created here ({error.strerror}); set {self.variable}")


@dataclass
class _Wait:
    """The wait of one ticket."""

    queue: LockQueue
    ticket: Ticket
    what: str
    free_since: dict[str, float] = field(default_factory=dict)

    def until_held(self, limit_h: float, on_wait: Callable[[str], None]) -> Held:
        """Return the first lock that this ticket gets."""
        began = time.monotonic()
        said, next_line = "", began + NOTICE_S
        while True:
            now = time.monotonic()
            for name in self.ticket.entry.wants:
                if self._is_my_turn(name, now) and (descriptor := self.queue.try_lock(name)) is not None:
                    return Held(name, descriptor, self.ticket)
            if stopping.is_set():
                raise StoppedError
            if now - began > 3600 * limit_h:
                text = self._text()
                raise LimitError(f"stopped at its limit of {limit_h:g} h (limits.waiting_hours) while {text}")
            if now >= next_line:
                text = self._text()
                if text != said and not self._waits_for_own_run():
                    on_wait(text)
                    said, next_line = text, now + REPEAT_S
                else:
                    next_line = now + NOTICE_S
            time.sleep(self.queue.poll_s * random.uniform(0.5, 1.5))  # noqa: S311 - so that processes do not look at the same time

    def _is_my_turn(self, name: str, now: float) -> bool:
        """Return whether nobody who asked earlier waits for a lock, or those who do left it unused for too long."""
        ahead = self.ticket.waiting_ahead(name)
        if not ahead:
            return True
        if self.queue.is_taken(name):
            self.free_since.pop(name, None)
            return False
        return now - self.free_since.setdefault(name, now) > PATIENCE_S * ahead

    def _text(self) -> str:
        entries, wants = read_queue(self.queue.folder), self.ticket.entry.wants
        holders = {name: self.queue.holder(name, entries) for name in wants if self.queue.is_taken(name)}
        short = len(wants) == 1
        parts = [self.queue.holder_text(name, one, "it" if short else name) for name, one in holders.items()]
        return f"waiting for {self.what}: {'; '.join(parts) or 'others have asked for it before'}"

    def _waits_for_own_run(self) -> bool:
        """Return whether steps of the same run have all locks that a step wants. Nobody needs a line about it."""
        entries, mine = read_queue(self.queue.folder), self.ticket.entry
        holders = [self.queue.holder(name, entries) for name in mine.wants]
        return all(one is not None and (one.run, one.pids[:1]) == (mine.run, mine.pids[:1]) for one in holders)


def clock_text(seconds: float) -> str:
    """Return a time today as 05:01, and another time with its date."""
    then = time.localtime(seconds)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", then)
