"""Runners: they make the artifacts of calls or find them in the cache, and count. This module does not use Prefect.

A broken case fails its call with one line and leaves no artifact; the flow continues with the other cases. So does a
bug, which is raised after everything else is done.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from flows.devices.child import can_read_apart, compute_in_child, read_in_child
from flows.devices.progress import progress_callback
from flows.devices.slots import allowed_devices
from flows.devices.waiting import WaitingNotice, call_slot
from flows.machine.stage import format_seconds
from flows.machine.stopping import stopping
from flows.machine.terminal import terminal
from flows.privacy.log_filter import install, learn_call, path_filter, rule_of
from flows.runs.retries import RETRY_DELAYS_S, is_transient
from flows.store.access import require_cache
from flows.store.artifacts import ArtifactStore, BuildRecord
from flows.store.references import Ref
from flows.store.step import Call, Place, content_key
from medad.base.errors import CaseFailure, InputError, UserError, group_lines
from medad.base.settings import ANY_MACHINE, MachineSettings

_log = logging.getLogger(__name__)
MAX_CALLS_ON_CLUSTER = 64
"""Number of device calls to submit at once to a cluster of unknown size."""


def to_case_failure(label: str, stage: str, error: Exception) -> CaseFailure:
    """Turn an error into a CaseFailure: its rule, and separately its path, which only the terminal shows."""
    transient = is_transient(error)
    if isinstance(error, UserError):
        path, rule = rule_of(error)
        machine_fault = not isinstance(error, InputError)
        return CaseFailure(
            label, stage, path_filter.scrub(rule), path, transient=transient, machine_fault=machine_fault
        )
    return CaseFailure(label, stage, f"internal error ({type(error).__name__})", bug=error, transient=transient)


@dataclass(frozen=True)
class BuiltArtifact:
    """The artifact of a call, made now or found in the cache."""

    ref: Ref
    cached: bool
    """Whether it existed before."""


MakeArtifact = Callable[[Call, Path, str], BuildRecord | None]
"""Function that makes a call's artifact in an empty folder: (call, folder, key)."""


def find_or_make(label: str, call: Call, *, refresh: bool, make: MakeArtifact) -> BuiltArtifact | CaseFailure:
    """Find a call's artifact in the cache or make it. Return a CaseFailure if that fails.

    `label` is the name of the case for the user and the UI.
    """
    learn_call(label, call)
    notice = WaitingNotice()
    try:
        parts = call.parts()
        key = content_key(parts)

        def body(out: Path) -> BuildRecord | None:
            notice.end()
            return make(call, out, key)

        ref, cached = ArtifactStore().build(call.step, parts, body, refresh=refresh, on_wait=notice.show)
        return BuiltArtifact(ref, cached)
    except Exception as error:
        return to_case_failure(label, call.step.name, error)
    finally:
        notice.end()


def find_or_make_patiently(label: str, call: Call, *, refresh: bool, make: MakeArtifact) -> BuiltArtifact | CaseFailure:
    """Do the same as `find_or_make`, and try again if a share did not answer a step that needs no device."""
    for delay_s in RETRY_DELAYS_S if call.step.kind is None else ():
        outcome = find_or_make(label, call, refresh=refresh, make=make)
        if isinstance(outcome, BuiltArtifact) or not outcome.transient:
            return outcome
        time.sleep(delay_s)
    return find_or_make(label, call, refresh=refresh, make=make)


def show_end(call: Call, outcome: object) -> None:
    """Count the end of a call on the terminal. A call that was stopped is neither done nor failed."""
    if isinstance(outcome, BuiltArtifact):
        terminal.ended(call.step.name, cached=outcome.cached)
    elif isinstance(outcome, Exception | CaseFailure):
        terminal.ended(call.step.name, failed=True)


def make_in_this_process(call: Call, out: Path, key: str) -> BuildRecord | None:
    """Run a call in this process. A device step on a GPU runs in a process that sees only this GPU."""
    if can_read_apart(call):
        read_in_child(call, out, key)
        return None
    if call.step.kind is None:
        with progress_callback(call) as report:
            call.run(out, Place("cpu", call.batch_size, report), key=key)
        return None
    if any(device.is_gpu for device in allowed_devices(call.machine.gpus)):
        return compute_in_child(call, out, key)
    with call_slot(call, call.machine.gpus) as slot, progress_callback(call) as report:
        made = BuildRecord.now(slot.device.name)
        call.run(out, Place(slot.device.torch_name, call.batch_size, report), key=key)
        return made


@dataclass(frozen=True)
class TaskRecord:
    """One finished call, for the manifest."""

    step: str
    case_id: str
    key: str
    cached: bool
    seconds: float
    """Time that making the artifact took, now or in an earlier run."""
    device: str
    """Device that computed it: cpu or gpu-N. Empty for a step that needs no device."""


class SubmittedCall(abc.ABC):
    """A call that was submitted to a runner."""

    label: str

    @abc.abstractmethod
    def ref(self) -> Ref | None:
        """Wait for the artifact and return its reference. None: the call failed, and the runner recorded why."""


@dataclass(frozen=True)
class FinishedCall(SubmittedCall):
    """A call that has ended."""

    label: str
    found: Ref | None

    def ref(self) -> Ref | None:
        return self.found


class Runner(abc.ABC):
    """The base of all runners. It runs calls and records what was computed, cached or failed."""

    makes_artifacts: ClassVar[bool] = True
    """Whether artifacts are made. False for a dry run, which writes nothing."""

    def __init__(self, machine: MachineSettings = ANY_MACHINE, *, refresh: bool = False) -> None:
        self.machine = machine
        self.refresh = refresh
        self.records: list[TaskRecord] = []
        self.failures: list[CaseFailure] = []
        self.notes: list[str] = []
        """Deviations from the request, such as a smaller batch size, for the report."""
        self.groups: dict[str, tuple[str, str]] = {}
        """Label -> (group, case): the row or system that the label belongs to, and the name of the case in it."""
        self.begin()

    def begin(self) -> None:
        """Prepare this process and the store for a run."""
        install()
        require_cache()
        stopping.clear()
        store = ArtifactStore()
        store.sweep()
        mark = store.mark_run()
        self.lock = mark.path
        weakref.finalize(self, mark.end)

    @property
    def max_device_calls(self) -> int:
        """Return how many device calls to submit at once. More would only block workers that others need."""
        if self.machine.engine_address is not None:
            return self.machine.engine_workers or MAX_CALLS_ON_CLUSTER
        return len(allowed_devices(self.machine.gpus))

    @abc.abstractmethod
    def submit(self, label: str, call: Call) -> SubmittedCall:
        """Start a call."""

    def run(self, label: str, call: Call) -> Ref | None:
        """Run a call, wait, and return its reference. None: it failed."""
        return self.submit(label, call).ref()

    def for_group(self, group: str, part: str) -> GroupRunner:
        """Return a runner for one part of a group, for example `seed 0` of `tp`. Its labels name both. Counts are
        shared."""
        return GroupRunner(self, group, part)

    def set_group(self, label: str, group: str, case_id: str) -> str:
        """Remember which group a label belongs to; return the label."""
        self.groups[label] = (group, case_id)
        return label

    def show_in_ui(self, show: Callable[[], None]) -> None:  # noqa: B027 - most runners have no UI
        """Create artifacts in Prefect's UI by calling `show`. Runners without a UI do nothing."""

    def record_failure(self, failure: CaseFailure) -> None:
        """Record a failed case and print its line once."""
        if failure.line not in {known.line for known in self.failures}:  # one bad file may fail many steps
            terminal.failure(failure.line)
        self.failures.append(failure)

    def record_failures(self, failures: Sequence[CaseFailure]) -> None:
        """Record several failed cases. Equal problems of one category are printed as one line with their number."""
        known = {one.line for one in self.failures}
        for line in group_lines(one for one in failures if one.line not in known):
            terminal.failure(line)
        self.failures.extend(failures)

    def record_success(self, label: str, ref: Ref, *, cached: bool) -> None:
        """Record a finished call. Print its notes, and itself if each task is to be shown."""
        sidecar = ArtifactStore().sidecar(ref)
        terminal.detail(f"{ref.step} {label}: {'cached' if cached else format_seconds(sidecar.seconds)}")
        if sidecar.notes:
            note = f"{ref.step} {label}: {', '.join(sidecar.notes)}"
            terminal.line(note)
            self.notes.append(note)
        self.records.append(TaskRecord(ref.step, label, ref.key, cached, sidecar.seconds, sidecar.device))

    def record_outcome(self, label: str, outcome: BuiltArtifact | CaseFailure) -> Ref | None:
        """Record how a call ended and return its reference. None: it failed."""
        if isinstance(outcome, BuiltArtifact):
            self.record_success(label, outcome.ref, cached=outcome.cached)
            return outcome.ref
        self.record_failure(outcome)
        return None

    def failures_for_report(self, *, pseudonymous: bool) -> tuple[CaseFailure, ...]:
        """Return the failures for a report. File names are left out if cases have pseudonyms."""
        found = []
        for failure in self.failures:
            group, case_id = self.groups.get(failure.case_id, (failure.group, failure.case_id))
            file = "" if pseudonymous else failure.file
            found.append(CaseFailure(case_id, failure.stage, failure.rule, file, failure.category, group))
        return tuple(found)

    @property
    def computed(self) -> int:
        return sum(not record.cached for record in self.records)

    @property
    def cached(self) -> int:
        return sum(record.cached for record in self.records)


class LocalRunner(Runner):
    """A runner that runs each call immediately in this process, without Prefect, server or cluster.

    Device steps on a CPU run in this process, so they have no time limit and no retry with smaller batches.
    """

    def submit(self, label: str, call: Call) -> SubmittedCall:
        terminal.submitted(call.step.name)
        outcome = find_or_make_patiently(label, call, refresh=self.refresh, make=make_in_this_process)
        if isinstance(outcome, CaseFailure) and outcome.bug is not None:
            _log.error("internal error", exc_info=outcome.bug)
        show_end(call, outcome)
        return FinishedCall(label, self.record_outcome(label, outcome))


_runner_type: ContextVar[type[Runner]] = ContextVar("runner", default=LocalRunner)


def new_runner(machine: MachineSettings, *, refresh: bool) -> Runner:
    """Return a runner of the type that the current flow was started with."""
    return _runner_type.get()(machine, refresh=refresh)


@contextlib.contextmanager
def use_runner(kind: type[Runner]) -> Iterator[None]:
    """Make `new_runner` return runners of this type inside the `with` block."""
    token = _runner_type.set(kind)
    try:
        yield
    finally:
        _runner_type.reset(token)


class GroupRunner(Runner):
    """A runner for one group of calls. Several groups share one runner, each in its own thread."""

    def __init__(self, shared: Runner, group: str, part: str) -> None:
        # the base class's initialiser would begin another run
        self.shared, self.group, self.part = shared, group, part
        self.machine, self.refresh, self.makes_artifacts = shared.machine, shared.refresh, shared.makes_artifacts  # type: ignore[misc]
        self.records, self.failures, self.notes, self.groups = (
            shared.records, shared.failures, shared.notes, shared.groups,
        )  # fmt: skip

    @property
    def max_device_calls(self) -> int:
        return self.shared.max_device_calls

    def show_in_ui(self, show: Callable[[], None]) -> None:
        self.shared.show_in_ui(show)

    def label(self, case_id: str) -> str:
        """Return the label of a case of this group in the shared runner."""
        return self.set_group(f"{self.group}, {self.part}: {case_id}", self.group, f"{self.part}: {case_id}")

    def submit(self, label: str, call: Call) -> SubmittedCall:
        return self.shared.submit(self.label(label), call)

    def record_failure(self, failure: CaseFailure) -> None:
        self.shared.record_failure(replace(failure, case_id=self.label(failure.case_id)))

    def record_failures(self, failures: Sequence[CaseFailure]) -> None:
        self.shared.record_failures([replace(one, case_id=self.label(one.case_id)) for one in failures])


@dataclass
class SharedCall(SubmittedCall):
    """A call that several threads wait for. Its end is recorded once."""

    task: SubmittedCall

    def __post_init__(self) -> None:
        self.label = self.task.label
        self._lock = threading.Lock()
        self._known: tuple[Ref | None] | None = None

    def ref(self) -> Ref | None:
        with self._lock:
            if self._known is None:
                self._known = (self.task.ref(),)
            return self._known[0]
