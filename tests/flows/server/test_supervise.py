"""The processes that a supervisor adopts."""

from __future__ import annotations

import os
from pathlib import Path

from flows.server.supervise import _children, _reap_orphans
from tests.flows.live_server import wait_for


def test_dead_orphans_are_collected_and_the_supervisors_own_children_are_not() -> None:
    orphan, own = (os.fork() or os._exit(3) for _ in range(2))
    wait_for("both are dead", lambda: {orphan, own} <= _children(os.getpid(), dead=True))
    assert not {orphan, own} & _children(os.getpid()), "a zombie is no run that could be ended"
    _reap_orphans({own})
    assert not Path(f"/proc/{orphan}").exists()
    assert os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]) == 3
