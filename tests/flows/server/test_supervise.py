"""The processes that a supervisor adopts."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.server import supervise
from flows.server.supervise import Child, _children, _reap_orphans
from tests.flows.live_server import wait_for


def test_dead_orphans_are_collected_and_the_supervisors_own_children_are_not() -> None:
    orphan, own = (os.fork() or os._exit(3) for _ in range(2))
    wait_for("both are dead", lambda: {orphan, own} <= _children(os.getpid(), dead=True))
    assert not {orphan, own} & _children(os.getpid()), "a zombie is no run that could be ended"
    _reap_orphans({own})
    assert not Path(f"/proc/{orphan}").exists()
    assert os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]) == 3


def test_a_process_that_cannot_be_killed_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for a dead network share does not even end by SIGKILL."""
    asked: list[Any] = []

    def wait(seconds: float | None = None) -> int:
        assert seconds is not None, "this would wait without an end"
        raise subprocess.TimeoutExpired("watcher", seconds)

    process = SimpleNamespace(
        pid=0, wait=wait, send_signal=asked.append, kill=lambda: asked.append("kill"), poll=lambda: None
    )
    child = Child("watcher", [], stop_s=0.01)
    child.process = process  # type: ignore[assignment]
    monkeypatch.setattr(supervise, "KILL_S", 0.01)
    child.stop()
    assert asked == [signal.SIGTERM, "kill"]
    assert child.process is None
