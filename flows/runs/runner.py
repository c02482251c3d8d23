"""Jobs as Prefect tasks: cached by content, run one after another or beside each other on any task runner.

A broken case ends its task in state Failed with one line; nothing of it is cached, and the flow goes on with the
others. So does a bug, whose traceback is logged at once and raised when all else is done.
"""

from __future__ import annotations

import abc
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.states import Failed
from prefect.transactions import get_transaction

from flows.devices.child import load_ahead
from flows.devices.engines import EngineRunner
from flows.devices.server_limit import server_slot
from flows.devices.slots import devices_of
from flows.machine.environment import cache_root
from flows.machine.stopping import stopping
from flows.machine.terminal import format_seconds, terminal
from flows.privacy.log_filter import confined, install, learn_job, path_filter
from flows.runs.retries import RETRY_DELAYS_S, is_transient
from flows.store.artifacts import ArtefactStore, Made, Ref, content_key
from flows.store.serializer import VerifiedSerializer
from flows.store.step import DeviceJob, Job
from medad.base.errors import InputError, UserError
from medad.base.settings import ANY_MACHINE, MachineSettings

CLUSTER_AT_A_TIME = 64
"""Device jobs handed to a cluster of unknown size."""


@dataclass(frozen=True)
class Failure:
    """A step that a broken rule ended."""

    case_id: str
    stage: str
    rule: str
    path: str = field(default="", repr=False)
    """The offending file: for the user's terminal only, since a path may hold a patient's name."""
    bug: Exception | None = field(default=None, repr=False)
    """Set where no rule was broken but the program: it is raised once all else is done."""
    category: str = ""
    """Of an image: what its id begins with."""
    again: bool = field(default=False, repr=False)
    """A share did not answer: the same may go well at once."""
    of_machine: bool = field(default=False, repr=False)
    """No file is to blame but where it ran (a full disk, a GPU that is not there): the same may go well later."""

    @property
    def line(self) -> str:
        return f"{self.path or self.case_id}: {self.rule}"


def describe(label: str, stage: str, error: Exception) -> Failure:
    """What to keep of an error: the rule without the path, which goes to the terminal alone."""
    again = is_transient(error)
    if isinstance(error, InputError):
        return Failure(label, stage, path_filter.scrub(error.rule), str(error.path), again=again)
    if isinstance(error, UserError):
        text = " ".join(str(error).split())
        head, _, rest = text.partition(": ")
        path, rule = (head, rest) if head.startswith("/") and rest else ("", text)
        return Failure(label, stage, path_filter.scrub(rule), path, again=again, of_machine=True)
    return Failure(label, stage, f"internal error ({type(error).__name__})", bug=error, again=again)


@confined
def perform(label: str, job: Job, refresh: bool) -> Ref | State[Any]:
    """The body of every task: make the artefact or find it. `label` is what the user and the UI see of the case."""
    learn_job(label, job)
    store = ArtefactStore()

    def make(out: Path) -> Made | None:
        if job.before_devices:
            load_ahead()
        with server_slot() if isinstance(job, DeviceJob) else nullcontext():
            return job.make(out, key=key)

    try:
        inputs = job.inputs()
        key = content_key(job.parts())
        return store.build(job.step, inputs, make, refresh=refresh)
    except Exception as error:
        transaction = get_transaction()
        if transaction is not None:
            transaction.write_on_commit = False  # or Prefect would keep the failed state as a result
        failure = describe(label, job.step.name, error)
        if failure.bug is not None:
            get_run_logger().error("internal error", exc_info=True)
        elif not failure.again and not isinstance(job, DeviceJob):  # of the others Prefect says so itself
            get_run_logger().error("%s: %s", failure.case_id, failure.rule)
        return Failed(message=f"{failure.case_id}: {failure.rule}", data=failure)


def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Prefect's record of a job: named by the same key as its artefact.

    None, which is "run it, keep nothing", only where an input cannot be read: the body then says which. Anything else
    that raises here would make Prefect run uncached for ever with only a log line, so nothing else may.
    """
    job: Job = parameters["job"]
    try:
        return f"{job.step.name}-{content_key(job.parts())}"
    except (UserError, OSError):
        return None


def task_of(job: Job, *, refresh: bool) -> Task[[str, Job, bool], Ref | State[Any]]:
    """The Prefect task for a job's step."""
    return Task(
        perform,
        name=job.step.name,
        task_run_name=job.step.name + " {label}",
        cache_key_fn=cache_key,
        persist_result=True,
        result_storage=cache_root() / "results",
        result_serializer=VerifiedSerializer(),
        # the store already verified the artefact; a second copy in memory would outlive a change on disk
        cache_result_in_memory=False,
        refresh_cache=refresh,
        # what a library prints goes to the log, through its filter, and not into a worker's output
        log_prints=True,
        # reading and writing alone: a night of training that failed would fail again
        retries=0 if isinstance(job, DeviceJob) else len(RETRY_DELAYS_S),
        retry_delay_seconds=list(RETRY_DELAYS_S),
        retry_condition_fn=_worth_another_try,
    )


def _worth_another_try(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, Failure) and state.data.again


@dataclass(frozen=True)
class TaskRecord:
    """One finished task, for the manifest."""

    step: str
    case_id: str
    key: str
    cached: bool
    seconds: float
    """What making the artefact took, whenever that was."""
    device: str
    """Where it was computed: cpu or gpu-N; empty of a step that needs no device."""


class Tally:
    """Runs jobs and keeps count: what was computed, what was cached, what failed."""

    def __init__(self, machine: MachineSettings = ANY_MACHINE, *, refresh: bool = False) -> None:
        self.machine = machine
        self.refresh = refresh
        self.records: list[TaskRecord] = []
        self.failures: list[Failure] = []
        self.notes: list[str] = []
        """What went otherwise than asked for, for the report."""
        self._begin()

    def _begin(self) -> None:
        install()
        stopping.clear()
        store = ArtefactStore()
        store.sweep()
        weakref.finalize(self, store.mark_run())
        context = FlowRunContext.get()
        if context is not None and isinstance(context.task_runner, EngineRunner):
            context.task_runner.use(self.machine)

    @property
    def device_jobs_at_a_time(self) -> int:
        """How many of them to hand out at once: more would hold workers that have other things to do."""
        if self.machine.engine_address is not None:
            return self.machine.engine_workers or CLUSTER_AT_A_TIME
        return len(devices_of(self.machine.gpus))

    def submit(self, label: str, job: Job) -> Submitted:
        """Start a job on the flow's task runner."""
        return UnderWay(self, label, job, task_of(job, refresh=self.refresh).submit(label, job, self.refresh))

    def run(self, label: str, job: Job) -> Ref | None:
        """Run a job and wait; None when it failed."""
        return self.submit(label, job).ref()

    def fail(self, failure: Failure) -> None:
        """Note a case that cannot go on, and tell the user once."""
        if failure.line not in {known.line for known in self.failures}:  # one bad file may end many steps
            terminal.line(failure.line)
        self.failures.append(failure)

    def done(self, label: str, ref: Ref, *, cached: bool) -> None:
        """Note a finished task."""
        sidecar = ArtefactStore().sidecar(ref)
        terminal.line(f"{ref.step} {label}: {'cached' if cached else format_seconds(sidecar.seconds)}")
        if sidecar.notes:
            note = f"{ref.step} {label}: {', '.join(sidecar.notes)}"
            terminal.line(note)
            self.notes.append(note)
        self.records.append(TaskRecord(ref.step, label, ref.key, cached, sidecar.seconds, sidecar.device))

    @property
    def computed(self) -> int:
        return sum(not record.cached for record in self.records)

    @property
    def cached(self) -> int:
        return sum(record.cached for record in self.records)

    @property
    def bugs(self) -> list[Exception]:
        return [failure.bug for failure in self.failures if failure.bug is not None]


class Submitted(abc.ABC):
    """A job that was handed to a tally."""

    label: str

    @abc.abstractmethod
    def ref(self) -> Ref | None:
        """Wait for its artefact. None when the job failed; the tally then holds why."""


@dataclass(frozen=True)
class UnderWay(Submitted):
    """A job on Prefect's task runner."""

    tally: Tally
    label: str
    job: Job
    future: PrefectFuture[Any]

    def ref(self) -> Ref | None:
        try:
            self.future.wait()
        except BaseException:  # Ctrl-C, a worker's cancellation: leaving the flow waits for its threads
            stopping.set()
            raise
        state = self._state()
        # a task that was cancelled or crashed raises here, and ends the flow
        outcome = state.result(raise_on_failure=not state.is_failed())
        if isinstance(outcome, Ref):
            self.tally.done(self.label, outcome, cached=state.name == "Cached" or outcome.reused)
            return outcome
        if isinstance(outcome, Failure):
            self.tally.fail(outcome)
        elif isinstance(outcome, Exception):  # outside the body: Prefect's own doing
            self.tally.fail(describe(self.label, self.job.step.name, outcome))
        else:
            raise TypeError(f"task {self.job.step.name} ended in {state.name} without a result")
        return None

    def _state(self) -> State[Any]:
        """How the task ended; a cluster's worker that died with it leaves no state, but an error of the cluster's."""
        state = self.future.state
        if state.is_final():
            return state
        try:
            self.future.result(raise_on_failure=False)
        except Exception as error:
            rule = f"the worker that carried it died ({type(error).__name__})"
            return Failed(message=rule, data=Failure(self.label, self.job.step.name, rule))
        return self.future.state
