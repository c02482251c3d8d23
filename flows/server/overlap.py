"""One run of a deployment at a time, by a lock that the kernel frees at the end of a process. Others queue for it.

Prefect's concurrency limit of a deployment is a lease. A run whose server is away for minutes loses it, and is ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from flows.devices.lock_queue import LockQueue
from flows.devices.waiting import WAITING_STATE, show_run_state
from flows.machine.environment import cache_root
from flows.privacy.log_filter import path_filter

Overlap = Literal["wait", "skip"]
"""Behaviour of a run while another one of its deployment is at work. `skip` concerns runs of a schedule only."""
POLL_S = 0.5


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
        show_run_state(WAITING_STATE, line)

    label = "" if run is None else path_filter.scrub(run.name)
    with queue.lock((name,), run=label, what=name, on_wait=show_wait):
        if waited:
            show_run_state("Running", "")
        yield None
