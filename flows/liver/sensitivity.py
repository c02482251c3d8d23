"""The flow liver-sensitivity: lesions of known size and contrast, planted into healthy scans, looked for by a model.

Each scan is segmented once without lesions, which fixes its threshold, and once for each volume planted into it. A
volume that breaks a rule is left out and listed; the report is written whatever happens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import BaseModel

from flows.devices.engines import RUNNER
from flows.liver import run_folder as liver_folder
from flows.liver.flow import Stages
from flows.liver.run_folder import Models
from flows.liver.sensitivity_steps import MeasuredVolume, MeasurePlanted, SensitivityReport
from flows.liver.split import Sides, salted_member, trained_members, training_rows
from flows.liver.steps import Prepare, Segment, source_digest
from flows.machine.terminal import terminal
from flows.privacy.log_filter import confined
from flows.runs import artifacts as ui
from flows.runs.outcome import Outcome, failed_steps, final_state
from flows.runs.plan import planned
from flows.runs.run_folder import MANIFEST, RunFolder, copied, installed_versions, publish
from flows.runs.runner import Submitted, describe
from flows.store.artifacts import Ref
from flows.store.step import Job
from medad.base.errors import ConfigError, UserError
from medad.base.private import PrivatePath
from medad.base.settings import MACHINE_FIELDS
from medad.cohort.folds import find_leaks
from medad.config.liver import LiverSettings
from medad.config.sensitivity import SensitivitySettings

if TYPE_CHECKING:
    from medad.cohort.datasets import Case

REPORT_FILES = ("report.html", "report.json", "lesions.csv", "sensitivity.csv", "sensitivity.tex", "preview.png")


class SensitivityRequest(BaseModel):
    """Whose sensitivity is measured. As a flow's parameter its JSON is stored, so all its paths are private."""

    model: PrivatePath
    """An earlier run's folder."""
    out: PrivatePath
    allow_training_cases: bool = False
    """Go on with scans that the model was trained on; the report says so at its head."""


@dataclass(frozen=True)
class Healthy:
    """A healthy scan, segmented as it is."""

    case: Case
    prepare: Prepare
    segment: Segment
    segmented: Ref


class SensitivityStages(Stages):
    """The liver flow's stages, and those of a study."""

    def __init__(self, settings: LiverSettings, study: SensitivitySettings, *, refresh: bool) -> None:
        super().__init__(settings, refresh=refresh)
        self.study = study

    def in_turn(self, jobs: Iterable[tuple[str, Job]]) -> list[Ref | None]:
        """Run device jobs, as many at a time as there are devices; in their order, None for one that failed."""
        waiting: deque[Submitted] = deque()
        found: list[Ref | None] = []
        for label, job in jobs:
            if len(waiting) >= self.tally.device_jobs_at_a_time:
                found.append(waiting.popleft().ref())
            waiting.append(self.tally.submit(label, job))
        return found + [task.ref() for task in waiting]

    def segment_healthy(self, cases: Sequence[Case], models: Models) -> list[Healthy]:
        """Prepare and segment the scans as they are."""
        settings = self.settings
        jobs = [Prepare(case, self.study.healthy, settings.preprocess, training=False) for case in cases]
        tasks = [self.tally.submit(job.case.id, job) for job in jobs]
        ready = []
        for job, task in zip(jobs, tasks, strict=True):
            if (prepared := task.ref()) is not None:
                self.used.append(self._used("test", job.case.id, prepared))
                segment = Segment(
                    prepared,
                    models.restoration,
                    models.segmentation,
                    settings.inference,
                    settings.postprocess,
                    settings.machine,
                )
                ready.append((job, segment))
        segmented = self.in_turn([(job.case.id, segment) for job, segment in ready])
        return [
            Healthy(job.case, job, segment, ref)
            for (job, segment), ref in zip(ready, segmented, strict=True)
            if ref is not None
        ]

    def measure(self, scans: Sequence[Healthy]) -> list[MeasuredVolume]:
        """Plant, segment and measure every volume of the study in every scan."""
        study, machine = self.study, self.settings.machine
        jobs = [
            (scan, volume, MeasurePlanted(scan.prepare, scan.segment, scan.segmented, volume, study.measure, machine))
            for scan in scans
            for volume in study.volumes()
        ]
        with terminal.bars():
            refs = self.in_turn([(f"{scan.case.id}, {volume.label}", job) for scan, volume, job in jobs])
        return [
            MeasuredVolume(scan.case.id, ref) for (scan, _, _), ref in zip(jobs, refs, strict=True) if ref is not None
        ]

    def end(
        self,
        out: Path,
        results: Sequence[MeasuredVolume],
        models: Models | None,
        trained_on: frozenset[str] | None,
        started: float,
    ) -> Outcome:
        """Report, publish into the run folder, show in Prefect's UI without the folder's path."""
        job = SensitivityReport(
            settings=self.study,
            results=tuple(results),
            trained_on=None if trained_on is None else tuple(sorted(trained_on)),
            failures=failed_steps(self.tally, opaque=self.opaque),
            versions=tuple(sorted(installed_versions().items())),
            notes=tuple(self.tally.notes),
            named=not self.opaque,
        )
        report = self.tally.run("report", job)
        if (plan := planned(self.tally)) is not None:
            return plan
        run = RunFolder(
            path=out,
            settings=self.study,
            copies=tuple(copied(report, *REPORT_FILES)),
            manifest=liver_folder.manifest(self.used, models),
            seconds=time.monotonic() - started,
        )
        headline = publish(run, self.tally)
        ui.show_run(ui.SENSITIVITY, out, self.tally, private=True)
        return Outcome.of(self.tally, run_folder=out, headline=headline)


def settings_for(study: SensitivitySettings, model: Path) -> LiverSettings:
    """The model run's settings as the study uses them: its scans, its machine, and the values that it puts over them.

    Raises
    ------
    ConfigError
        The folder holds no model, or a value breaks a rule.
    """
    of_model = liver_folder.settings_of_run(model)
    settings = liver_folder.settings_over(of_model, study.settings_by_key, model=model, source="settings")
    own = {name: getattr(study, name) for name in MACHINE_FIELDS}
    return settings.model_copy(update={"name": study.name, "test_data": study.healthy, "folds": None, **own})


def trained_on(model: Path, cases: Sequence[Case]) -> frozenset[str] | None:
    """Ids of the cases whose scan or patient the run in folder `model` was trained on; None where it does not say."""
    rows = training_rows(model)
    if not rows:
        return None
    sides = Sides.of((), cases).with_salted()
    tested = [salted_member(member, sides.salted.get(("test", member.case_id))) for member in sides.members("test")]
    trained = trained_members(rows)
    return frozenset(member.case_id for member in tested if find_leaks(trained, [member]))


def refuse_training_cases(model: Path, seen: frozenset[str] | None) -> None:
    """Raise ConfigError, one line, where a study would measure a model on what it was trained on, or may."""
    if seen is None:
        raise ConfigError(
            f"{model}: {MANIFEST} names no training scan, so these may have been among them; give the folder of the "
            "run that trained the model, or --allow-training-cases"
        )
    if seen:
        raise ConfigError(
            f"{model}: was trained on {', '.join(sorted(seen))}; give other healthy scans, or --allow-training-cases"
        )


@flow(
    name="liver-sensitivity",
    flow_run_name="sensitivity {study.name}",
    task_runner=RUNNER,
    persist_result=False,
    log_prints=True,
)
@confined
def sensitivity(
    request: SensitivityRequest, study: SensitivitySettings, settings: LiverSettings, refresh: bool = False
) -> State[Outcome]:
    """Measure a model's sensitivity to planted lesions. `settings` are those of `settings_for`."""
    started = time.monotonic()
    stages = SensitivityStages(settings, study, refresh=refresh)
    cases = stages.find(study.healthy, "healthy")
    readable = []
    for case in cases:
        try:
            source_digest(case.scan)
            readable.append(case)
        except UserError as error:
            stages.tally.fail(describe(case.id, "find", error))
    seen = trained_on(request.model, readable)
    if not request.allow_training_cases:
        refuse_training_cases(request.model, seen)
    models = stages.adopt(request.model)
    results = [] if models is None else stages.measure(stages.segment_healthy(readable, models))
    return final_state(stages.end(request.out, results, models, seen, started), useful=bool(results))
