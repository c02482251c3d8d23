"""The stop signal of a flow. Threads cannot be interrupted, so long work checks `stopping` regularly."""

from __future__ import annotations

import signal
import threading
from types import FrameType

stopping = threading.Event()
"""Event that is set when the flow is cancelled or interrupted."""
STOPPED_LINE = "stopped by the user"


class StoppedError(BaseException):
    """The end of a step whose flow was interrupted. It is not a bug, so it is not an Exception.

    The last checkpoint of a training stays.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(STOPPED_LINE)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Return the exit code of a program that this signal ended, as shells report it: 130 or 143."""
        return 128 + self.number


def raise_on_signals() -> None:
    """Make Ctrl-C and SIGTERM end this program with a StoppedError. Call this in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    stopping.set()
    raise StoppedError(number)
