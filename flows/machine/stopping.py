"""How a flow that is ended from outside reaches its threads: none can be interrupted, so whatever takes long asks."""

from __future__ import annotations

import threading

stopping = threading.Event()
"""Set when the flow is being ended from outside."""


class StoppedError(BaseException):
    """Ends a step whose flow was interrupted (a training's last checkpoint stays). No bug, hence no Exception."""
