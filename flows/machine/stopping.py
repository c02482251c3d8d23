"""The stop signal of a flow. Threads cannot be interrupted, so long work checks `stopping` regularly."""

from __future__ import annotations

import threading

stopping = threading.Event()
"""Event that is set when the flow is cancelled or interrupted."""


class StoppedError(BaseException):
    """The end of a step whose flow was interrupted. It is not a bug, so it is not an Exception.

    The last checkpoint of a training stays.
    """
