"""One run of a deployment at a time, by a lock that the kernel frees at the end of a process.

Prefect's concurrency limit of a deployment is a lease. A run whose server is away for minutes loses it, and is ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Running

from flows.machine.environment import cache_root
from flows.machine.stopping import StoppedError, stopping

Overlap = Literal["wait", "skip"]
"""Behaviour of a run while another one of its deployment is at work. `skip` concerns runs of a schedule only."""
POLL_S = 1.0
SAY_S = 5.0
"""Time of waiting after which a run says what it waits for, s."""
WAITING = "Waiting"
"""Name of the state of a run that waits for another one."""


@contextlib.contextmanager
def one_at_a_time(name: str, overlap: Overlap) -> Iterator[str | None]:
    """Hold the lock of a deployment. Yield None, or with `skip` the run that has it: then there is nothing to do.

    Raises
    ------
    StoppedError
        The run was cancelled while it waited.
    """
    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    path = cache_root() / "locks" / f"deployment-{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _take(descriptor):
            if overlap == "skip" and run is not None and run.auto_scheduled:
                yield _holder(descriptor)
                return
            _wait(descriptor)
        label = "a run without a name" if run is None else run.name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"run": label, "since": time.time()}).encode(), 0)
        yield None
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    """Return the run that has a lock, such as `liver default, since 05:01`."""
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
        since = datetime.fromtimestamp(values["since"]).astimezone()
        return f"{values['run']}, since {since:%H:%M}"
    except (ValueError, KeyError):  # it is being written
        return "another run"


def _wait(descriptor: int) -> None:
    began, said = time.monotonic(), False
    while not _take(descriptor):
        if stopping.is_set():
            raise StoppedError
        if not said and time.monotonic() - began >= SAY_S:
            said = True
            text = f"waiting for the run {_holder(descriptor)}"
            get_run_logger().info(text)
            _show(Running(name=WAITING, message=text))
        time.sleep(POLL_S)
    if said:
        _show(Running())


def _show(state: State) -> None:
    """Show a state of this run in the UI. A server that is away changes nothing."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        client.set_flow_run_state(context.flow_run.id, state, force=True)
