"""The liver flow: prepare each case, train in two phases, segment and evaluate each case, report, publish.

Each stage can be run alone; the whole is the stages in a row over one set of tasks. A case that breaks a rule is left
out and listed; the report is written whatever happens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import BaseModel

from flows import case_ids, liver_folder, ui
from flows.cache import Ref
from flows.engines import RUNNER
from flows.liver_folder import Models, UsedCase
from flows.liver_jobs import (
    AdoptModel,
    Evaluate,
    ExportSlices,
    HandStep,
    HandStepName,
    JointNetwork,
    Plant,
    Prepare,
    Segment,
    TrainJoint,
    TrainRestoration,
    TrainSegmentation,
)
from flows.liver_report import Report, Reported
from flows.outcome import Outcome, failed_steps, final_state
from flows.plan import Plan, new_tally, planned
from flows.privacy import PrivateLiver, PrivatePath, confined, learn_data, path_filter
from flows.publish import RunFolder, installed_versions, publish
from flows.tasks import Failure, Submitted, Tally, describe
from flows.terminal import terminal
from medad.config import DatasetSettings, PreprocessSettings
from medad.errors import UserError
from medad.settings import ANY_MACHINE

if TYPE_CHECKING:
    from medad.datasets import Case

_DATA = ("train_data", "test_data")


@dataclass(frozen=True)
class ReadyCase:
    """A test case after preprocessing."""

    case: Case
    prepared: Ref
    planted: Ref | None


class SegmentRequest(BaseModel):
    """Scans to segment. As a flow's parameter its JSON is stored, so all its paths are private."""

    scans: tuple[PrivatePath, ...]
    liver_masks: tuple[PrivatePath, ...]
    """One for each scan, on its grid."""
    model: PrivatePath
    """An earlier run's folder."""
    out: PrivatePath


class StepRequest(BaseModel):
    """One preprocessing step on one file."""

    name: HandStepName
    source: PrivatePath
    liver: PrivatePath | None
    liver_labels: tuple[int, ...]
    settings: PreprocessSettings


class Stages:
    """The stages over one tally: each takes what the one before gave and leaves out what failed."""

    def __init__(self, settings: PrivateLiver, *, refresh: bool, tally: Tally | None = None) -> None:
        """`tally`: one that is shared with other stages, which then decides about `refresh`."""
        self.settings = settings
        self.tally = tally or new_tally(settings.machine, refresh=refresh)
        self.used: list[UsedCase] = []
        self.opaque = settings.test_data.opaque_ids or settings.train_data.opaque_ids
        """Whether names of files are to be left out of what is shown."""

    def find(self, data: DatasetSettings, use: str) -> list[Case]:
        """The cases of a data set; what is wrong with it is noted."""
        from medad.datasets import find_cases
        from medad.samples import samples_dir

        learn_data(data, f"{use} data")
        try:
            cases, problems = find_cases(data, samples_dir(), case_ids.identify)
            for case in cases:
                for path in (case.scan, case.label):
                    if path is not None:
                        path_filter.learn(path, case.id)
            self.tell_apart([case for case in cases if case.opaque])
        except UserError as error:
            self.tally.fail(describe(f"{use} data", "find", error))
            return []
        for problem in problems:
            path_filter.learn(problem.path, problem.case_id)
            if problem.opaque:
                self.opaque = True
                terminal.line(f"{problem.case_id} is {problem.path}")
            self.tally.fail(Failure(problem.case_id, "find", problem.rule, str(problem.path)))
        return cases

    def tell_apart(self, cases: Sequence[Case]) -> None:
        """Keep in the register, and say on the user's terminal, which scan an opaque id stands for."""
        self.opaque = self.opaque or bool(cases)
        for case in cases:
            terminal.line(f"{case.id} is {case.scan}")
        if not isinstance(self.tally, Plan):  # a dry run leaves nothing behind
            case_ids.register_found(
                case_ids.RegisteredCase(case.id, case.scan, case.label, case.liver_labels) for case in cases
            )

    def prepare_training(self) -> list[Submitted]:
        """Start the preparation of every training case."""
        data = self.settings.train_data
        return [self._prepare(case, data, training=True) for case in self.find(data, "train")]

    def prepare_test(self) -> list[ReadyCase]:
        """Plant lesions where the settings ask for it, prepare, and wait."""
        data = self.settings.test_data
        return self.prepare_cases(self.find(data, "test"), data)

    def prepare_cases(self, cases: list[Case], data: DatasetSettings) -> list[ReadyCase]:
        """As `prepare_test`, for given cases."""
        planted: dict[str, Ref] = {}
        if data.plant is not None:
            jobs = [Plant(case, data, data.plant) for case in cases]
            submitted = [self.tally.submit(job.case.id, job) for job in jobs]
            cases = []
            for job, task in zip(jobs, submitted, strict=True):
                if (ref := task.ref()) is not None:
                    planted[job.case.id] = ref
                    cases.append(job.planted(ref))
        tasks = [self._prepare(case, data, training=False) for case in cases]
        ready = [(case, task.ref()) for case, task in zip(cases, tasks, strict=True)]
        found = [ReadyCase(case, ref, planted.get(case.id)) for case, ref in ready if ref is not None]
        self.used += [UsedCase("test", each.case.id, each.planted or each.prepared) for each in found]
        return found

    def _prepare(self, case: Case, data: DatasetSettings, *, training: bool) -> Submitted:
        return self.tally.submit(case.id, Prepare(case, data, self.settings.preprocess, training))

    def train(self, prepared: list[Submitted]) -> Models | None:
        """Both networks, by the schedule asked for; None when there is nothing to train on or a training failed."""
        found = [(task.label, ref) for task in prepared if (ref := task.ref()) is not None]
        self.used += [UsedCase("train", case_id, ref) for case_id, ref in found]
        refs = tuple(ref for _, ref in found)
        if not refs:
            self.tally.fail(Failure("model", "restoration", "no training case could be prepared"))
            return None
        if self.settings.train.schedule == "joint":
            return self._train_joint(refs)
        with terminal.bars():
            restoration = self.tally.run("model", TrainRestoration(refs, self.settings, self.settings.machine))
            if restoration is None:
                return None
            segmentation = self.tally.run(
                "model", TrainSegmentation(refs, restoration, self.settings, self.settings.machine)
            )
        return None if segmentation is None else Models(restoration, segmentation)

    def _train_joint(self, prepared: tuple[Ref, ...]) -> Models | None:
        with terminal.bars():
            joint = self.tally.run("model", TrainJoint(prepared, self.settings, self.settings.machine))
        if joint is None:
            return None
        restoration = self.tally.run("model", JointNetwork(joint, "restoration"))
        segmentation = self.tally.run("model", JointNetwork(joint, "segmentation"))
        return None if restoration is None or segmentation is None else Models(restoration, segmentation)

    def adopt(self, run: Path) -> Models | None:
        """The networks of an earlier run's folder."""
        refs = [self.tally.run(name, AdoptModel(run / "model" / name)) for name in ("restoration", "segmentation")]
        return None if refs[0] is None or refs[1] is None else Models(refs[0], refs[1])

    def segment_and_evaluate(self, cases: list[ReadyCase], models: Models, data: DatasetSettings) -> list[Reported]:
        """Segment as many cases at a time as there are devices; evaluation of one goes on beside the next."""
        settings = self.settings
        waiting: deque[tuple[ReadyCase, Submitted]] = deque()
        under_way: list[tuple[ReadyCase, Ref, Submitted | None]] = []

        def go_on() -> None:
            ready, task = waiting.popleft()
            segmented = task.ref()
            if segmented is None:
                return
            evaluation = None
            if ready.case.tumour_label is not None and ready.case.label is not None:
                evaluate = Evaluate(ready.case, data, ready.prepared, segmented, settings.evaluation)
                evaluation = self.tally.submit(ready.case.id, evaluate)
            under_way.append((ready, segmented, evaluation))

        for ready in cases:
            if len(waiting) >= self.tally.device_jobs_at_a_time:
                go_on()
            segment = Segment(
                ready.prepared,
                models.restoration,
                models.segmentation,
                settings.inference,
                settings.postprocess,
                settings.machine,
                models.snapshot,
            )
            waiting.append((ready, self.tally.submit(ready.case.id, segment)))
        while waiting:
            go_on()
        return [
            Reported(ready.case.id, ready.prepared, segmented, None if task is None else task.ref(), ready.planted)
            for ready, segmented, task in under_way
        ]

    def report(self, results: list[Reported], models: Models | None, notes: tuple[str, ...]) -> Ref | None:
        """report.html and report.json."""
        job = Report(
            settings=self.settings,
            results=tuple(results),
            failures=failed_steps(self.tally, opaque=self.opaque),
            restoration=None if models is None else models.restoration,
            segmentation=None if models is None else models.segmentation,
            versions=tuple(sorted(installed_versions().items())),
            notes=(*notes, *self.tally.notes),
        )
        return self.tally.run("report", job)

    def finish(
        self,
        out: Path,
        results: list[Reported],
        models: Models | None,
        notes: tuple[str, ...],
        started: float,
        *,
        private: bool = False,
    ) -> Outcome:
        """Report, publish into the run folder, show in Prefect's UI, there without a `private` folder's path."""
        if models is None and liver_folder.has_model(out):
            # an earlier run's networks and masks are worth more than this one's empty report
            out = out.with_name(f"{out.name}.failed")
        report = self.report(results, models, notes)
        if (plan := planned(self.tally)) is not None:
            return plan
        run = RunFolder(
            path=out,
            settings=self.settings,
            copies=liver_folder.copies(report, results, models),
            manifest=liver_folder.manifest(self.used, models),
            seconds=time.monotonic() - started,
        )
        headline = publish(run, self.tally)
        ui.show_run(ui.LIVER, out, self.tally, private=private)
        return Outcome.of(self.tally, run_folder=out, headline=headline)


@flow(name="liver", flow_run_name="liver {settings.name}", task_runner=RUNNER, persist_result=False, log_prints=True)
@confined
def liver(settings: PrivateLiver, out: Path, refresh: bool = False, notes: tuple[str, ...] = ()) -> State[Outcome]:
    """From scans to a report in the run folder `out`."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh)
    training = stages.prepare_training()
    cases = stages.prepare_test()
    models = stages.train(training)
    results = [] if models is None else stages.segment_and_evaluate(cases, models, settings.test_data)
    return final_state(stages.finish(out, results, models, notes, started), useful=bool(results))


@flow(
    name="liver-prepare",
    flow_run_name="prepare {settings.name}",
    task_runner=RUNNER,
    persist_result=False,
    log_prints=True,
)
@confined
def prepare(settings: PrivateLiver, refresh: bool = False) -> State[Outcome]:
    """Prepare all cases of a configuration: finds what is wrong with a data set before a night of training."""
    stages = Stages(settings, refresh=refresh)
    training = stages.prepare_training()
    test = stages.prepare_test()
    if (plan := planned(stages.tally)) is not None:
        return final_state(plan, useful=True)
    pairs: dict[str, list[tuple[str, Ref | None]]] = {
        "train": [(task.label, task.ref()) for task in training],
        "test": [(c.case.id, c.prepared) for c in test],
    }
    details: dict[str, Any] = {
        use: [{"case": case_id, "folder": str(ref.folder())} for case_id, ref in found if ref is not None]
        for use, found in pairs.items()
    }
    return final_state(Outcome.of(stages.tally, details=details), useful=any(details.values()))


@flow(
    name="liver-export-slices",
    flow_run_name="export slices of {settings.name}",
    task_runner=RUNNER,
    persist_result=False,
    log_prints=True,
)
@confined
def export_slices(settings: PrivateLiver, with_training: bool = False, refresh: bool = False) -> State[Outcome]:
    """Slices of the test cases, and of the training cases if asked for, as pictures. Cases have opaque ids."""
    hidden = {name: getattr(settings, name).model_copy(update={"opaque_ids": True}) for name in _DATA}
    stages = Stages(settings.model_copy(update=hidden), refresh=refresh)
    training = stages.prepare_training() if with_training else []
    jobs: list[tuple[str, ExportSlices]] = []
    for ready in stages.prepare_test():
        jobs.append((ready.case.id, ExportSlices(ready.prepared, ready.case, settings.test_data)))
    for task in training:
        if (ref := task.ref()) is not None:
            jobs.append((task.label, ExportSlices(ref, None, settings.train_data)))
    tasks = [stages.tally.submit(case_id, job) for case_id, job in jobs]
    exported = [(task.label, ref) for task in tasks if (ref := task.ref()) is not None]
    if (plan := planned(stages.tally)) is not None:
        return final_state(plan, useful=True)
    details: dict[str, Any] = {
        "exported": [{"case": case_id, "folder": str(ref.folder())} for case_id, ref in exported]
    }
    return final_state(Outcome.of(stages.tally, details=details), useful=bool(exported))


@flow(
    name="liver-train", flow_run_name="train {settings.name}", task_runner=RUNNER, persist_result=False, log_prints=True
)
@confined
def train(settings: PrivateLiver, out: Path, refresh: bool = False) -> State[Outcome]:
    """Prepare the training cases and train both phases; the run folder gets the model and a report of its training."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh)
    models = stages.train(stages.prepare_training())
    return final_state(stages.finish(out, [], models, (), started), useful=models is not None)


@flow(
    name="liver-evaluate",
    flow_run_name="evaluate {settings.name}",
    task_runner=RUNNER,
    persist_result=False,
    log_prints=True,
)
@confined
def evaluate(settings: PrivateLiver, model: Path, out: Path, refresh: bool = False) -> State[Outcome]:
    """Segment and evaluate a configuration's test cases with the networks of an earlier run."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh)
    cases = stages.prepare_test()
    models = stages.adopt(model)
    results = [] if models is None else stages.segment_and_evaluate(cases, models, settings.test_data)
    return final_state(stages.finish(out, results, models, (), started), useful=bool(results))


@flow(name="liver-segment", flow_run_name="segment", task_runner=RUNNER, persist_result=False, log_prints=True)
@confined
def segment(request: SegmentRequest, settings: PrivateLiver, refresh: bool = False) -> State[Outcome]:
    """Segment scans, which `test_data` describes, with the networks of an earlier run.

    Cases have opaque ids: file names may name patients.
    """
    from medad.datasets import Case

    started = time.monotonic()
    data = settings.test_data
    stages = Stages(settings, refresh=refresh)
    stages.opaque = True
    cases: dict[str, Case] = {}
    given = zip(request.scans, request.liver_masks, case_ids.identify(request.scans), strict=True)
    for scan, mask, case_id in given:
        path_filter.learn(scan, case_id)
        path_filter.learn(mask, case_id)
        if case_id in cases:
            stages.tally.fail(Failure(case_id, "find", "this scan was given before", str(scan)))
            continue
        cases[case_id] = Case(case_id, scan, mask, data.liver_labels or (), None, opaque=True)
    stages.tell_apart(list(cases.values()))
    ready = stages.prepare_cases(list(cases.values()), data)
    models = stages.adopt(request.model)
    results = [] if models is None else stages.segment_and_evaluate(ready, models, data)
    return final_state(stages.finish(request.out, results, models, (), started, private=True), useful=bool(results))


@flow(name="liver-step", flow_run_name="step {request.name}", task_runner=RUNNER, persist_result=False, log_prints=True)
@confined
def hand_step(request: StepRequest, refresh: bool = False) -> State[Outcome]:
    """One preprocessing step on one file."""
    tally = new_tally(ANY_MACHINE, refresh=refresh)
    label = "input"
    if request.source.is_dir():  # DICOM, whose ids are registered wherever it comes in
        [label] = case_ids.identify([request.source])
        terminal.line(f"{label} is {request.source}")
        if not isinstance(tally, Plan):
            found = case_ids.RegisteredCase(label, request.source, request.liver, request.liver_labels)
            case_ids.register_found([found])
    for path in (request.source, request.liver):
        if path is not None:
            path_filter.learn(path, label)
    job = HandStep(request.name, request.source, request.liver, request.liver_labels, request.settings)
    ref = tally.run(label, job)
    if (plan := planned(tally)) is not None:
        return final_state(plan, useful=True)
    details = {} if ref is None else {"folder": str(ref.folder())}
    return final_state(Outcome.of(tally, details=details), useful=ref is not None)
