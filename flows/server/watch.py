"""The link of a running flow to its server: signs of life on this machine, cancellation, and a server that is away.

Prefect tells a run of its cancellation through its worker, by a connection that does not survive every restart. So each
run also asks the server itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter, WorkQueueFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Running

from flows.devices.tickets import is_locked
from flows.machine.environment import prefect_home

ASK_S = 10.0
"""Time between two looks at the server, s."""
PATIENCE_S = 25.0
"""Time for Prefect's own way of cancelling, s."""
GONE = "The process is gone: its machine or its worker stopped"
PRESUMED_DEAD = ("No heartbeat for", "Taken by a worker")
"""Beginnings of the messages with which the automations of `flows.server.automations` mark a run as crashed."""


def _lock_of(run_id: UUID) -> Path:
    return prefect_home() / "adflows-runs" / f"{run_id}.lock"


@contextlib.contextmanager
def hold_run(run_id: UUID) -> Iterator[None]:
    """Hold a lock that shows that this run's process lives. The kernel frees it at the end of the process."""
    path = _lock_of(run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def lives(run_id: UUID) -> bool:
    """Return whether the process of a run lives on this machine."""
    path = _lock_of(run_id)
    if is_locked(path):
        return True
    path.unlink(missing_ok=True)
    return False


def end_dead_runs(pool: str, host: str) -> list[str]:
    """Mark the runs of this machine's queue as crashed whose processes do not live. Return their names.

    Call this before the worker starts. A run may have outlived its worker, so not all are dead.
    """
    begun = FlowRunFilter(state={"type": {"any_": [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]}})
    pools, queues = WorkPoolFilter(name={"any_": [pool]}), WorkQueueFilter(name={"any_": [host]})
    dead = []
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=begun, work_pool_filter=pools, work_queue_filter=queues):
            if not lives(run.id):
                client.set_flow_run_state(run.id, Crashed(message=GONE), force=True)
                dead.append(run.name)
    return dead


@dataclass
class Watch:
    """The look of a run at itself on the server."""

    run_id: UUID
    stop: Callable[[], None]
    """Ends the flow, as a signal does."""
    cancelled: bool = False
    """Whether the run was cancelled or deleted, and `stop` was called for it."""
    _since: float | None = None

    def look(self, client: SyncPrefectClient) -> None:
        """Read the run's state once, and act on a cancellation, on a deletion and on a false alarm."""
        try:
            run = client.read_flow_run(self.run_id)
        except ObjectNotFound:
            self._end()
            return
        if run.state is None:
            return
        if run.state.type in {StateType.CANCELLING, StateType.CANCELLED}:
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since >= PATIENCE_S:
                self._end()
        elif is_false_alarm(run):
            client.set_flow_run_state(self.run_id, Running(message="The server was away. The run goes on."), force=True)

    def _end(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self.stop()

    def run(self, ended: threading.Event) -> None:
        """Look at an interval until the run has ended. An error of the server or the network changes nothing."""
        while not ended.wait(ASK_S):
            with contextlib.suppress(Exception), get_client(sync_client=True) as client:
                self.look(client)

    def report(self) -> None:
        """Set the final state of a cancelled run. Prefect's engine leaves it to whoever sent the signal."""
        with contextlib.suppress(ObjectNotFound), get_client(sync_client=True) as client:
            client.set_flow_run_state(self.run_id, Cancelled(), force=True)


def is_false_alarm(run: FlowRun) -> bool:
    """Return whether an automation took a run for dead, because the server got no sign of life."""
    state = run.state
    return state is not None and state.type is StateType.CRASHED and str(state.message or "").startswith(PRESUMED_DEAD)


def end_flow() -> None:
    """End this process's flow as Prefect's worker does for a cancelled run. A plain signal would count as a crash."""
    from prefect._internal import control_listener
    from prefect.utilities.engine import commit_control_intent_and_ack

    commit_control_intent_and_ack(
        lambda: control_listener._set_intent("cancel"), control_listener.clear_intent, lambda: None
    )
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def watch_run(run_id: UUID) -> Iterator[None]:
    """Watch a run on the server from a thread."""
    ended = threading.Event()
    watch = Watch(run_id, end_flow)
    thread = threading.Thread(target=watch.run, args=(ended,), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(ASK_S)
        if watch.cancelled:
            watch.report()


def ask_patiently(ask: Callable[[], httpx.Response | object]) -> object:
    """Return the answer of a request. As long as the server does not answer, repeat it."""
    while True:
        try:
            return ask()
        except httpx.TransportError:
            time.sleep(ASK_S)
