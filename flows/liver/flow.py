"""The liver flow: prepare each case, train in two phases, segment and evaluate each case, report, publish.

Each stage can be run alone; the whole is the stages in a row over one set of tasks. A case that breaks a rule is left
out and listed; the report is written whatever happens.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import BaseModel

from flows.devices.engines import RUNNER
from flows.liver import run_folder as liver_folder
from flows.liver import split as liver_sides
from flows.liver.report_steps import Report, Reported
from flows.liver.run_folder import Models, UsedCase
from flows.liver.split import BOTH, PLACE, Sides, Use
from flows.liver.steps import (
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
from flows.machine.terminal import terminal
from flows.privacy import case_ids
from flows.privacy.log_filter import confined, learn_data, path_filter
from flows.runs import artifacts as ui
from flows.runs.outcome import Outcome, failed_steps, final_state
from flows.runs.plan import Plan, new_tally, planned
from flows.runs.run_folder import RunFolder, installed_versions, publish
from flows.runs.runner import Failure, Submitted, Tally, describe
from flows.store.artifacts import Ref
from medad.base.errors import UserError
from medad.base.private import PrivatePath
from medad.base.settings import ANY_MACHINE
from medad.cohort.folds import Member, find_leaks
from medad.config.liver import DatasetSettings, LiverSettings, PreprocessSettings

if TYPE_CHECKING:
    from medad.cohort.datasets import Case

_DATA = ("train_data", "test_data")
UNKNOWN_TRAINING = "The model's folder does not say which cases trained it; those tested here may be among them."
"""A note of the report."""


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

    def __init__(
        self, settings: LiverSettings, *, refresh: bool, uses: tuple[Use, ...] = BOTH, tally: Tally | None = None
    ) -> None:
        """`tally`: one that is shared with other stages, which then decides about `refresh`."""
        self.settings = settings
        self.uses = uses
        """The data sets that are looked at; folds need both."""
        self.tally = tally or new_tally(settings.machine, refresh=refresh)
        self.used: list[UsedCase] = []
        self.leaked = False
        """A patient was on both sides, and nothing of those cases is trained or evaluated."""
        self.trained: list[dict[str, Any]] = []
        """Of an adopted model: what its run's manifest says of the cases that trained it."""
        self._sides: tuple[Any, Sides] | None = None
        self._tested: list[ReadyCase] = []
        self._trained_on: dict[Models, list[Member]] = {}
        self.opaque = settings.test_data.opaque_ids or settings.train_data.opaque_ids
        """Whether names of files are to be left out of what is shown."""

    def over(self, settings: LiverSettings, tally: Tally) -> Stages:
        """Stages over the same found and prepared cases, which note in another tally.

        `settings` may differ from these in what finding and preparing cases does not depend on.
        """
        other = copy.copy(self)
        other.settings, other.tally, other.used = settings, tally, []
        return other

    def find(self, data: DatasetSettings, use: str) -> list[Case]:
        """The cases of a data set; what is wrong with it is noted."""
        from medad.cohort.datasets import find_cases
        from medad.cohort.samples import samples_dir

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

    def sides(self) -> Sides:
        """The cases that train and those that are tested; none at all where a patient is on both sides."""
        settings = self.settings
        of = (settings.train_data, settings.test_data, settings.folds)
        if self._sides is None or self._sides[0] != of:
            self._sides = of, self._find_sides()
        return self._sides[1]

    def _find_sides(self) -> Sides:
        settings, folds = self.settings, self.settings.folds
        wanted = self.uses if folds is None else BOTH
        found: dict[Use, list[Case]] = {use: [] for use in BOTH}
        for use in wanted:
            found[use] = self.find(settings.train_data if use == "train" else settings.test_data, use)
        if folds is not None and not all(found.values()):
            return Sides()  # a fold of what is left would be another fold
        try:
            sides = Sides.of(found["train"], found["test"])
            if folds is not None:
                sides = sides.fold(folds)
            if not isinstance(self.tally, Plan):
                sides = sides.with_salted()
        except UserError as error:
            self.tally.fail(describe(PLACE, "find", error))
            return Sides()
        self.tally.notes += sides.notes
        if "test" not in self.uses or self._apart(sides, sides.members("train"), sides.members("test")):
            return sides
        return Sides()

    def _apart(self, sides: Sides, train: Sequence[Member], test: Sequence[Member]) -> bool:
        """Whether no patient is both in `train`, or among those that trained an adopted model, and in `test`."""
        leaks = find_leaks(train, test)
        if self.trained:
            salted = [liver_sides.salted_member(member, sides.salted.get(("test", member.case_id))) for member in test]
            leaks += find_leaks(liver_sides.trained_members(self.trained), salted)
        if leaks:
            self.leaked = True
            failure = liver_sides.leakage(leaks)
            if failure not in self.tally.failures:
                self.tally.fail(failure)
        return not leaks

    def apart(self, train: Sequence[tuple[str, Ref]], test: Sequence[ReadyCase]) -> bool:
        """Whether no patient is on both sides, by the voxels of the prepared livers as well; if not, it is noted."""
        sides = self.sides()
        return self._apart_from([sides.prepared("train", case_id, ref) for case_id, ref in train], test)

    def _apart_from(self, train: Sequence[Member], test: Sequence[ReadyCase]) -> bool:
        sides = self.sides()
        tested = [sides.prepared("test", each.case.id, each.planted or each.prepared) for each in test]
        return self._apart(sides, train, tested)

    def prepare_training(self) -> list[Submitted]:
        """Start the preparation of every training case."""
        data = self.settings.train_data
        return [self._prepare(known.case, data, training=True) for known in self.sides().train]

    def prepare_test(self) -> list[ReadyCase]:
        """Plant lesions where the settings ask for it, prepare, and wait."""
        self._tested = self.prepare_cases([known.case for known in self.sides().test], self.settings.test_data)
        return self._tested

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
        self.used += [self._used("test", each.case.id, each.planted or each.prepared) for each in found]
        return found

    def _used(self, use: Use, case_id: str, ref: Ref) -> UsedCase:
        salted = {} if self._sides is None else self._sides[1].salted
        return UsedCase(use, case_id, ref, salted.get((use, case_id)))

    def _prepare(self, case: Case, data: DatasetSettings, *, training: bool) -> Submitted:
        return self.tally.submit(case.id, Prepare(case, data, self.settings.preprocess, training))

    def train(self, prepared: list[Submitted]) -> Models | None:
        """Both networks, by the schedule asked for; None when there is nothing to train on or a training failed."""
        found = [(task.label, ref) for task in prepared if (ref := task.ref()) is not None]
        self.used += [self._used("train", case_id, ref) for case_id, ref in found]
        refs = tuple(ref for _, ref in found)
        if not self.apart(found, self._tested):
            return None
        if not refs:
            if not self.leaked:  # else that is why
                self.tally.fail(Failure("model", "restoration", "no training case could be prepared"))
            return None
        joint = self.settings.train.schedule == "joint"
        models = self._train_joint(refs) if joint else self._train_two_phases(refs)
        if models is not None:
            self._trained_on[models] = [self.sides().prepared("train", case_id, ref) for case_id, ref in found]
        return models

    def _train_two_phases(self, prepared: tuple[Ref, ...]) -> Models | None:
        with terminal.bars():
            restoration = self.tally.run("model", TrainRestoration(prepared, self.settings, self.settings.machine))
            if restoration is None:
                return None
            segmentation = self.tally.run(
                "model", TrainSegmentation(prepared, restoration, self.settings, self.settings.machine)
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
        trained = self._trained_on.get(models, [])
        if "test" in self.uses and (trained or self.trained) and not self._apart_from(trained, cases):
            return []
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
            manifest=liver_folder.manifest(self.used, models, self.trained),
            seconds=time.monotonic() - started,
        )
        headline = publish(run, self.tally)
        ui.show_run(ui.LIVER, out, self.tally, private=private)
        return Outcome.of(self.tally, run_folder=out, headline=headline)


@flow(name="liver", flow_run_name="liver {settings.name}", task_runner=RUNNER, persist_result=False, log_prints=True)
@confined
def liver(settings: LiverSettings, out: Path, refresh: bool = False, notes: tuple[str, ...] = ()) -> State[Outcome]:
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
def prepare(settings: LiverSettings, refresh: bool = False) -> State[Outcome]:
    """Prepare all cases of a configuration: finds what is wrong with a data set before a night of training."""
    stages = Stages(settings, refresh=refresh)
    submitted = stages.prepare_training()
    test = stages.prepare_test()
    training = [(task.label, ref) for task in submitted if (ref := task.ref()) is not None]
    stages.apart(training, test)
    if (plan := planned(stages.tally)) is not None:
        return final_state(plan, useful=True)
    pairs = {"train": training, "test": [(each.case.id, each.prepared) for each in test]}
    details: dict[str, Any] = {
        use: [{"case": case_id, "folder": str(ref.folder())} for case_id, ref in found] for use, found in pairs.items()
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
def export_slices(settings: LiverSettings, with_training: bool = False, refresh: bool = False) -> State[Outcome]:
    """Slices of the test cases, and of the training cases if asked for, as pictures. Cases have opaque ids."""
    hidden = {name: getattr(settings, name).model_copy(update={"opaque_ids": True}) for name in _DATA}
    stages = Stages(settings.model_copy(update=hidden), refresh=refresh, uses=BOTH if with_training else ("test",))
    submitted = stages.prepare_training() if with_training else []
    test = stages.prepare_test()
    training = [(task.label, ref) for task in submitted if (ref := task.ref()) is not None]
    jobs: list[tuple[str, ExportSlices]] = []
    if stages.apart(training, test):
        jobs += [(each.case.id, ExportSlices(each.prepared, each.case, settings.test_data)) for each in test]
        jobs += [(case_id, ExportSlices(ref, None, settings.train_data)) for case_id, ref in training]
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
def train(settings: LiverSettings, out: Path, refresh: bool = False) -> State[Outcome]:
    """Prepare the training cases and train both phases; the run folder gets the model and a report of its training."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh, uses=("train",))
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
def evaluate(settings: LiverSettings, model: Path, out: Path, refresh: bool = False) -> State[Outcome]:
    """Segment and evaluate a configuration's test cases with the networks of an earlier run.

    None of them may be of a patient that trained these, as far as the run's manifest says.
    """
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh, uses=("test",))
    stages.trained = liver_sides.training_rows(model)
    if not stages.trained:
        stages.tally.notes.append(UNKNOWN_TRAINING)
    cases = stages.prepare_test()
    models = stages.adopt(model)
    results = [] if models is None else stages.segment_and_evaluate(cases, models, settings.test_data)
    return final_state(stages.finish(out, results, models, (), started), useful=bool(results))


@flow(name="liver-segment", flow_run_name="segment", task_runner=RUNNER, persist_result=False, log_prints=True)
@confined
def segment(request: SegmentRequest, settings: LiverSettings, refresh: bool = False) -> State[Outcome]:
    """Segment scans, which `test_data` describes, with the networks of an earlier run.

    Cases have opaque ids: file names may name patients.
    """
    from medad.cohort.datasets import Case

    started = time.monotonic()
    data = settings.test_data
    stages = Stages(settings, refresh=refresh, uses=())
    stages.opaque = True
    # beside scans whose names are hidden, theirs are as well
    stages.trained = [
        row | {"case": f"trained-{number}"}
        for number, row in enumerate(liver_sides.training_rows(request.model), start=1)
    ]
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
