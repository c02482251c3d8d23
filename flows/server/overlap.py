"""One run of a deployment at a time, by a lock that the kernel frees at the end of a process. Others queue for it.

Prefect's concurrency limit of a deployment is a lease. A run whose server is away for minutes loses it, and is ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Running

from flows.devices.lock_queue import LockQueue
from flows.machine.environment import cache_root
from flows.privacy.log_filter import path_filter

Overlap = Literal["wait", "skip"]
"""Behaviour of a run while another one of its deployment is at work. `skip` concerns runs of a schedule only."""
POLL_S = 0.5
WAITING = "Waiting"
"""Name of the state of a run that waits for another one."""


@contextlib.contextmanager
def one_at_a_time(name: str, overlap: Overlap) -> Iterator[str | None]:
    """Hold the lock of a deployment. Yield None, or with `skip` who has it: then there is nothing to do.

    Raises
    ------
    StoppedError
        The run was cancelled while it waited.
    """
    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    queue = LockQueue(cache_root() / "locks" / "deployments", "ADFLOWS_CACHE", POLL_S)
    if overlap == "skip" and run is not None and run.auto_scheduled and queue.is_taken(name):
        yield queue.holder_text(name, queue.holder(name), name)
        return
    waited = False

    def show_wait(line: str) -> None:
        nonlocal waited
        waited = True
        get_run_logger().info(line)
        _show(Running(name=WAITING, message=line))

    label = "" if run is None else path_filter.scrub(run.name)
    with queue.lock((name,), run=label, what=name, on_wait=show_wait):
        if waited:
            _show(Running())
        yield None


def _show(state: State) -> None:
    """Show a state of this run in the UI. A server that is away changes nothing."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        client.set_flow_run_state(context.flow_run.id, state, force=True)
