"""News of an inbox: scans that a pass would segment. Made to be asked each minute, for almost nothing.

A look compares the time stamps of folders with those of the look before. It reads the inbox only if they differ, if
scans are arriving, or after `FULL_LOOK_S`. A file that is overwritten in place changes no folder, so it is found then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flows.inbox.arrivals import Arrival
from flows.inbox.config import Inbox, InboxRequest, new_arrivals
from flows.inbox.results import FAILED
from flows.machine.environment import named_config

FULL_LOOK_S = 600.0
"""Longest time between two readings of a small inbox, s."""
MAX_SHARE = 1 / 1500
"""Share of a core that these readings may take. In a large inbox they are less frequent."""

Stamps = dict[Path, int]
"""Time stamp of each folder, ns. 0: it does not exist."""


@dataclass
class InboxNews:
    """The scans of one inbox that need a pass, as of the last look. Nothing is stored outside this process."""

    config: str
    """Name of the inbox's configuration."""
    clock: Callable[[], float] = time.monotonic
    cost: Callable[[], float] = time.thread_time
    """Clock of the CPU time."""
    readings: int = 0
    """Number of looks that read the inbox."""
    _stamps: Stamps = field(default_factory=dict)
    _changed: bool = True
    """Whether the next look reads the inbox: something changed, and may have changed again within one tick of a clock.
    """
    _due: float = 0.0
    _since: dict[Arrival, float] = field(default_factory=dict)
    """New scans, and the time since when their files are unchanged."""
    _complete: frozenset[Arrival] = frozenset()
    _unchanged_s: float = 0.0

    def look(self, *, read: bool = False) -> frozenset[Arrival]:
        """Return the new scans that are unchanged for as long as the inbox asks. `read`: do not rely on folders.

        Raises
        ------
        UserError
            The configuration, the inbox or its model cannot be used.
        """
        now = self.clock()
        if read or self._changed or now >= self._due or _stamp(self._stamps) != self._stamps:
            self._read(now)
        return self._complete

    def next_look_s(self, longest: float) -> float:
        """Return the time until the next look: less than `longest` if a scan can be complete before."""
        now = self.clock()
        left = [since + self._unchanged_s - now for since in self._since.values()]
        return min([longest, *(max(1.0, each) for each in left if each > 0)])

    def _read(self, now: float) -> None:
        self._changed = True  # an error below leaves it so
        began = self.cost()
        file = named_config(self.config, "inbox")
        inbox = Inbox.open(InboxRequest(config=str(file)))
        # before the listing, so that a change meanwhile is seen by the next look
        stamps = _stamp(_folders(inbox, file))
        self._since = {arrival: self._since.get(arrival, now) for arrival in new_arrivals(inbox)}
        self._unchanged_s = inbox.settings.unchanged_s
        self._complete = frozenset(each for each, since in self._since.items() if now - since >= self._unchanged_s)
        self._changed = stamps != self._stamps or len(self._complete) < len(self._since)
        self._stamps = stamps
        self._due = now + max(FULL_LOOK_S, (self.cost() - began) / MAX_SHARE)
        self.readings += 1


def _folders(inbox: Inbox, config: Path) -> Iterable[Path]:
    """Yield the files and folders whose time stamps say that something may be new."""
    yield from (config, inbox.folder.path, inbox.folder.path / FAILED)
    for parent, _, _ in os.walk(inbox.settings.inbox_folder):
        yield Path(parent)


def _stamp(paths: Iterable[Path]) -> Stamps:
    found = {}
    for path in paths:
        try:
            found[path] = path.stat().st_mtime_ns
        except OSError:
            found[path] = 0
    return found
