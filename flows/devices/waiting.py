"""The slot of a call. While a call waits, the terminal, the log and Prefect's UI say what it waits for."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from flows.devices.lock_queue import NOTICE_S
from flows.devices.progress import current_task
from flows.devices.slots import Slot, device_slot
from flows.machine.stopping import stopping
from flows.machine.terminal import terminal
from flows.privacy.log_filter import path_filter
from flows.store.step import Call
from medad.base.settings import Gpus

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

WAITING_STATE = "Waiting"
"""Name of the state of a task, and of its run, that waits for a device or for another run."""

_log = logging.getLogger(__name__)


class WaitingNotice:
    """The lines about what a call waits for. Nothing is shown before a call has waited for a while."""

    def __init__(self) -> None:
        self._shown = contextlib.ExitStack()
        self._say: Callable[[str], None] | None = None

    def show(self, line: str) -> None:
        """Show a line, and give the call's task the state Waiting."""
        if self._say is None:
            self._say = self._shown.enter_context(terminal.waiting(line, waited_s=NOTICE_S))
            self._shown.enter_context(_waiting_run(line))
        self._say(line)
        _log_line(line)
        _set_state(WAITING_STATE, line)

    def end(self) -> None:
        """Give the task the state Running again."""
        if self._say is not None:
            self._shown.close()
            _set_state("Running", "")
        self._say = None


_waiting_calls: Counter[object] = Counter()
"""Number of waiting calls, by run."""
_counting = threading.Lock()


@contextlib.contextmanager
def _waiting_run(line: str) -> Iterator[None]:
    """Give the run the state Waiting while at least one of its calls waits inside the `with` block."""
    if "prefect" not in sys.modules:
        yield
        return
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    run = None if context is None or context.flow_run is None else context.flow_run.id
    with _counting:
        _waiting_calls[run] += 1
        first = _waiting_calls[run] == 1
    if first:
        show_run_state(WAITING_STATE, line)
    try:
        yield
    finally:
        with _counting:
            _waiting_calls[run] -= 1
            last = not _waiting_calls[run]
        if last and not stopping.is_set():
            show_run_state("Running", "")


def show_run_state(name: str, message: str) -> None:
    """Show a state of the current run in the UI, if there is a run. A server that is away changes nothing."""
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
    from prefect.states import Running

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    # without retries, which would hold up the step for a minute
    once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
    with contextlib.suppress(Exception), once, get_client(sync_client=True) as client:
        client.set_flow_run_state(context.flow_run.id, Running(name=name, message=message or None), force=True)


@contextlib.contextmanager
def call_slot(call: Call, gpus: Gpus) -> Iterator[Slot]:
    """Wait for a device for a call and use it inside the `with` block. Raises what `device_slot` raises."""
    notice = WaitingNotice()
    training, hours = call.step.kind == "training", call.machine.limits.waiting_hours
    try:
        with device_slot(gpus, training=training, run=_run_name(call), limit_h=hours, on_wait=notice.show) as slot:
            notice.end()
            yield slot
    finally:
        notice.end()


def _run_name(call: Call) -> str:
    """Return the name of the run that makes a call, or the step's name if it has none."""
    if "prefect" in sys.modules:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None:
            return path_filter.scrub(context.flow_run.name)
    return call.step.name


def _log_line(line: str) -> None:
    if current_task() is None:
        _log.info(line)
        return
    from prefect import get_run_logger

    get_run_logger().info(line)


def _set_state(name: str, message: str) -> None:
    """Give the running task another state, as its engine does. An error of the UI never ends the step."""
    context = current_task()
    if context is None:
        return
    with contextlib.suppress(Exception):  # a server or the network can raise anything
        from prefect.states import Running
        from prefect.utilities.engine import emit_task_run_state_change_event

        task_run = context.task_run
        state: State[None] = Running(name=name, message=message)
        state.state_details.task_run_id, state.state_details.flow_run_id = task_run.id, task_run.flow_run_id
        initial, task_run.state = task_run.state, state
        task_run.state_id, task_run.state_type, task_run.state_name = state.id, state.type, state.name
        emit_task_run_state_change_event(task_run=task_run, initial_state=initial, validated_state=state)
