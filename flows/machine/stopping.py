"""The stop signal of a flow. Threads cannot be interrupted, so long work checks `stopping` regularly."""

from __future__ import annotations

import threading

stopping = threading.Event()
"""Event that is set when the flow is cancelled or interrupted."""


class StoppedError(BaseException):
    """Ends a step of an interrupted flow. A training's last checkpoint stays. It is not a bug, so not an Exception."""
