"""The runner under Prefect: each call is a task on the engine that the settings name.

Prefect stores states but no results; artifacts are in the artifact store only. A call whose artifact existed before
shows as Cached.

A task is about ten kB in Prefect's database. So only the first calls of a step are tasks, if a run has very many. The
others run in threads of the flow. The log counts them, and each one that fails becomes a task too, with the reason.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed

from flows.devices.child import compute_in_child, preload_libraries
from flows.devices.cluster import RunNeeds, require_fit
from flows.devices.engines import EngineTaskRunner
from flows.machine.environment import worker_count
from flows.machine.stopping import StoppedError, stopping
from flows.machine.terminal import terminal
from flows.privacy.log_filter import without_private_text
from flows.runs.prefect_log import mend_prefect_log
from flows.runs.retries import RETRY_DELAYS_S
from flows.runs.runner import (
    BuiltArtifact,
    Runner,
    SubmittedCall,
    find_or_make,
    find_or_make_patiently,
    make_in_this_process,
    show_end,
    to_case_failure,
)
from flows.runs.temporary_server import temporary_url
from flows.store.artifacts import BuildRecord
from flows.store.references import Ref
from flows.store.step import Call
from medad.base.errors import CaseFailure, ConfigError

mend_prefect_log()  # in each process that runs flows or tasks, also on a cluster's workers
CACHED_STATE = "Cached"
"""Name of the state of a task whose artifact existed before."""
TASKS_PER_STEP = 32
"""Number of calls of a step that are tasks. A run of a few scans has a task for each."""
COUNTED_CALLS = 50
"""Number of further calls of a step after which the log says how many have ended."""


def make_on_worker(call: Call, out: Path, key: str) -> BuildRecord | None:
    """Run a call. A device step runs in its device's process."""
    if call.step.before_devices or call.step.reads:
        preload_libraries()
    if call.step.kind is None:
        return make_in_this_process(call, out, key)
    return compute_in_child(call, out, key)


def _find_or_make(label: str, call: Call, refresh: bool, needs: RunNeeds | None) -> BuiltArtifact | CaseFailure:
    try:
        if needs is not None:
            require_fit(needs)
    except ConfigError as error:
        return to_case_failure(label, call.step.name, error)
    return find_or_make(label, call, refresh=refresh, make=make_on_worker)


@without_private_text
def run_call(label: str, call: Call, refresh: bool, needs: RunNeeds | None) -> State[Any]:
    """Run a call as the function of a task. `needs` is what a worker of a running cluster must have."""
    return state_of(call, label, _find_or_make(label, call, refresh, needs))


def state_of(call: Call, label: str, outcome: BuiltArtifact | CaseFailure) -> State[Any]:
    """Return the state of a task whose call ended like this."""
    if isinstance(outcome, BuiltArtifact):
        return Completed(name=CACHED_STATE if outcome.cached else "Completed", message=label, data=outcome)
    if outcome.bug is not None:
        get_run_logger().error("internal error", exc_info=outcome.bug)
    elif not outcome.transient and call.step.kind is None:  # Prefect logs tasks that it retries
        get_run_logger().error("%s: %s", outcome.case_id, outcome.rule)
    return Failed(message=f"{outcome.case_id}: {outcome.rule}", data=outcome)


@without_private_text
def report_failure(label: str, call: Call, failure: CaseFailure) -> State[Any]:
    """Fail as the function of a task, because this call failed without a task."""
    return state_of(call, label, failure)


def failure_task(call: Call) -> Task[[str, Call, CaseFailure], State[Any]]:
    """Return the Prefect task that shows the failure of a call that was no task."""
    name = call.step.name
    return Task(report_failure, name=name, task_run_name=name + " {label}", cache_policy=NO_CACHE, persist_result=False)


def prefect_task(call: Call) -> Task[[str, Call, bool, RunNeeds | None], State[Any]]:
    """Return the Prefect task for a call's step."""
    return Task(
        run_call,
        name=call.step.name,
        task_run_name=call.step.name + " {label}",
        cache_policy=NO_CACHE,
        persist_result=False,
        # output that libraries print goes to the log and its filter, not to the worker's output
        log_prints=True,
        # retry only reading and writing: a long training that failed would fail again
        retries=0 if call.step.kind is not None else len(RETRY_DELAYS_S),
        retry_delay_seconds=list(RETRY_DELAYS_S),
        retry_condition_fn=_should_retry,
    )


def _should_retry(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    outcome = state.result(raise_on_failure=False)
    return isinstance(outcome, CaseFailure) and outcome.transient


class PrefectRunner(Runner):
    """A runner that runs calls as tasks of the current Prefect flow."""

    def begin(self) -> None:
        super().begin()
        self._numbering = threading.Lock()
        self._needs: RunNeeds | None = None
        self._submitted, self._ended = Counter[str](), Counter[str]()
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        context = FlowRunContext.get()
        if context is not None and isinstance(context.task_runner, EngineTaskRunner):
            if self.machine.engine != "threads" and self.machine.engine_address is not None:
                url = PREFECT_API_URL.value()
                self._needs = RunNeeds.of_run(self.lock, None if url == temporary_url() else url)
            context.task_runner.use(self.machine, self._needs)
            if context.task_runner.in_this_process:
                workers = self.machine.engine_workers or worker_count()
                self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="calls")

    def submit(self, label: str, call: Call) -> SubmittedCall:
        terminal.submitted(call.step.name)
        with self._numbering:
            self._submitted[call.step.name] += 1
            is_task = self._submitted[call.step.name] <= TASKS_PER_STEP
        if self._threads is not None and not is_task:
            # the flow's context: loggers and the names of runs depend on it
            context = contextvars.copy_context()
            return FurtherCall(self, label, call, self._threads.submit(context.run, self._run_further, label, call))
        with self._numbering:  # Prefect numbers a flow's tasks without a lock
            future = prefect_task(call).submit(label, call, self.refresh, self._needs)
        running = RunningCall(self, label, call, future)
        if isinstance(future, PrefectConcurrentFuture):  # futures of clusters do not tell when they end
            future.wrapped_future.add_done_callback(running.show_end)
        return running

    def _run_further(self, label: str, call: Call) -> BuiltArtifact | CaseFailure:
        """Run a call that is not a task, and count it in the log."""
        if stopping.is_set():
            raise StoppedError
        outcome = find_or_make_patiently(label, call, refresh=self.refresh, make=make_on_worker)
        show_end(call, outcome)
        with self._numbering:
            self._ended[call.step.name] += 1
            ended = self._ended[call.step.name]
        if ended % COUNTED_CALLS == 0:
            count = ended + TASKS_PER_STEP
            get_run_logger().info("%s: %d ended; only the first %d are tasks", call.step.name, count, TASKS_PER_STEP)
        return outcome

    def show_in_ui(self, show: Callable[[], None]) -> None:
        try:
            show()
        except Exception as error:  # a server or the network can raise anything
            get_run_logger().warning("artifacts could not be shown: %s", type(error).__name__)


@dataclass(frozen=True)
class RunningCall(SubmittedCall):
    """A call that Prefect's task runner is running."""

    runner: Runner
    label: str
    call: Call
    future: PrefectFuture[Any]
    shown: threading.Lock = field(default_factory=threading.Lock)
    """Lock that is taken by whoever counts the end of the call on the terminal."""

    def show_end(self, ended: concurrent.futures.Future[Any]) -> None:
        """Count the end of the call when it ends, not when the flow asks for its result."""
        state = None if ended.cancelled() or ended.exception() else ended.result()
        self._show(state.result(raise_on_failure=False) if isinstance(state, State) and state.is_final() else None)

    def _show(self, outcome: object) -> None:
        if self.shown.acquire(blocking=False):
            show_end(self.call, outcome)

    def ref(self) -> Ref | None:
        try:
            self.future.wait()
        except BaseException:  # Ctrl-C or a cancellation; Prefect waits for the threads when the flow ends
            stopping.set()
            raise
        state = self._state()
        # a task that was cancelled or crashed raises here and ends the flow
        outcome = state.result(raise_on_failure=not state.is_failed())
        self._show(outcome)
        if isinstance(outcome, BuiltArtifact | CaseFailure):
            return self.runner.record_outcome(self.label, outcome)
        if isinstance(outcome, Exception):  # an error of Prefect, outside the task's function
            return self.runner.record_outcome(self.label, to_case_failure(self.label, self.call.step.name, outcome))
        raise TypeError(f"task {self.call.step.name} ended in {state.name} without a result")

    def _state(self) -> State[Any]:
        """Return the final state of the task.

        A task whose worker on a cluster died never gets a final state. The cluster's error then gives the reason.
        """
        state = self.future.state
        if state.is_final():
            return state
        try:
            self.future.result(raise_on_failure=False)
        except Exception as error:
            rule = f"the worker that ran it died ({type(error).__name__})"
            return Failed(message=rule, data=CaseFailure(self.label, self.call.step.name, rule))
        return self.future.state


@dataclass(frozen=True)
class FurtherCall(SubmittedCall):
    """A call that runs in a thread of the flow."""

    runner: Runner
    label: str
    call: Call
    future: concurrent.futures.Future[BuiltArtifact | CaseFailure]

    def ref(self) -> Ref | None:
        try:
            outcome = self.future.result()
        except BaseException:  # Ctrl-C or a cancellation
            stopping.set()
            raise
        if isinstance(outcome, CaseFailure):
            failure_task(self.call).submit(self.label, self.call, outcome).wait()
        return self.runner.record_outcome(self.label, outcome)
