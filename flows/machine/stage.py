"""Stages of a run on the terminal: how many calls of a step are done, cached and failed, and how long they took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Stage:
    """The calls of one step in one run, as the terminal shows them."""

    name: str
    expected: int = 0
    """Number of calls that are announced. 0: not known."""
    submitted: int = 0
    done: int = 0
    """Number of calls that made or found their artifact."""
    cached: int = 0
    failed: int = 0
    began: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    """Time when the latest call ended."""
    parts: dict[object, tuple[float, str]] = field(default_factory=dict)
    """Progress of the calls under way: share that is done, 0..1, and a note."""

    def count(self, *, cached: bool, failed: bool) -> None:
        """Count a call that has ended."""
        self.done += not failed
        self.failed += failed
        self.cached += cached
        self.last = time.monotonic()

    @property
    def ended(self) -> int:
        return self.done + self.failed

    @property
    def total(self) -> int:
        return max(self.expected, self.submitted)

    @property
    def idle(self) -> bool:
        """Whether no call is under way."""
        return self.ended == self.submitted

    @property
    def completed(self) -> float:
        """Return the number of ended calls and of the shares of the others."""
        return self.ended + sum(share for share, _ in self.parts.values())

    @property
    def line(self) -> str:
        """Return the line of a stage that has ended."""
        parts = [f"{self.name}: {self.done} done", *self._more, format_seconds(self.last - self.began)]
        return ", ".join(parts)

    @property
    def note(self) -> str:
        """Return the text beside the bar: counts, the note of a call under way, the time so far, and the time left."""
        left = self.seconds_left
        notes = [note for _, note in self.parts.values() if note]
        until = self.last if self.idle and self.ended else time.monotonic()
        parts = [f"{self.ended} of {self.total}", *self._more, *notes[:1], _whole(until - self.began)]
        return ", ".join(parts if left is None else [*parts, f"{_whole(left)} left"])

    @property
    def _more(self) -> list[str]:
        return [f"{self.cached} cached"] * bool(self.cached) + [f"{self.failed} failed"] * bool(self.failed)

    @property
    def seconds_left(self) -> float | None:
        """Return the estimated time until all calls have ended. None: unknown, or all have ended.

        The estimate takes the mean of the calls that were computed. Cached ones take no time.
        """
        computed = self.completed - self.cached
        if computed <= 0 or self.completed >= self.total:
            return None
        return (time.monotonic() - self.began) * (self.total - self.completed) / computed


def _whole(seconds: float) -> str:
    """Format a time without tenths of a second, which would flicker."""
    return format_seconds(seconds) if seconds >= 60 else f"{seconds:.0f} s"


def format_seconds(seconds: float) -> str:
    """Format a time, for example `1 h 02 min`, `2 min 03 s` or `4.5 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
