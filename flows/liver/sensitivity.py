"""The flow liver-sensitivity: lesions of known size and contrast, inserted into healthy scans, looked for by a model.

Each scan is segmented once without lesions, which fixes its threshold, and once for each volume inserted into it. A
volume that breaks a rule is left out and listed; the report is written whatever happens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from flows.liver import run_folder as liver_folder
from flows.liver import steps
from flows.liver.run_folder import Models
from flows.liver.split import Sides, salted_member, trained_members, training_rows
from flows.liver.stages import Stages
from flows.machine.terminal import terminal
from flows.runs import ui_artifacts
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome, finish_run
from flows.runs.run_folder import RunFolder, copies_of, installed_versions
from flows.runs.runner import SubmittedCall, to_case_failure
from flows.store.digests import path_digest
from flows.store.references import Ref
from flows.store.step import Call
from medad.base.errors import ConfigError, UserError
from medad.base.manifest import MANIFEST
from medad.base.private import PrivatePath
from medad.base.settings import MACHINE_FIELDS
from medad.cohort.folds import find_leaks
from medad.config.liver import LiverSettings
from medad.config.sensitivity import SensitivitySettings
from medad.steps.results import Segmenter, VolumeResult

if TYPE_CHECKING:
    from medad.cohort.datasets import Case, LabelledScan

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
    scan: LabelledScan
    segmented: Ref


class SensitivityStages(Stages):
    """The liver flow's stages, and those of a study."""

    def __init__(self, settings: LiverSettings, study: SensitivitySettings, *, refresh: bool) -> None:
        super().__init__(settings, refresh=refresh)
        self.study = study

    def in_turn(self, calls: Iterable[tuple[str, Call]]) -> list[Ref | None]:
        """Run device calls, as many at a time as there are devices; in their order, None for one that failed."""
        waiting: deque[SubmittedCall] = deque()
        found: list[Ref | None] = []
        for label, call in calls:
            if len(waiting) >= self.runner.max_device_calls:
                found.append(waiting.popleft().ref())
            waiting.append(self.runner.submit(label, call))
        return found + [task.ref() for task in waiting]

    def segment_healthy(self, cases: Sequence[Case], models: Models) -> list[Healthy]:
        """Prepare and segment the scans as they are."""
        from medad.cohort.datasets import LabelledScan

        settings = self.settings
        scans = [LabelledScan.of(case, self.study.healthy) for case in cases]
        tasks = [
            self.runner.submit(case.id, steps.prepare(scan, settings.preprocess, training=False))
            for case, scan in zip(cases, scans, strict=True)
        ]
        ready = []
        for case, scan, task in zip(cases, scans, tasks, strict=True):
            if (prepared := task.ref()) is not None:
                self.used.append(self._used("test", case.id, prepared))
                call = steps.segment(
                    prepared,
                    models.restoration,
                    models.segmentation,
                    settings.inference,
                    settings.postprocess,
                    settings.machine,
                )
                ready.append((case, scan, call))
        segmented = self.in_turn([(case.id, call) for case, _, call in ready])
        return [
            Healthy(case, scan, ref) for (case, scan, _), ref in zip(ready, segmented, strict=True) if ref is not None
        ]

    def measure(self, scans: Sequence[Healthy], models: Models) -> list[VolumeResult[Ref]]:
        """Insert, segment and measure every volume of the study in every scan."""
        study, settings = self.study, self.settings
        segmenter = Segmenter(
            settings.preprocess, models.restoration, models.segmentation, settings.inference, settings.postprocess
        )
        volumes = [(scan, volume) for scan in scans for volume in study.volumes()]
        with terminal.bars():
            refs = self.in_turn(
                (
                    f"{scan.case.id}, {volume.label}",
                    steps.measure(scan.scan, volume, study.measure, scan.segmented, segmenter, settings.machine),
                )
                for scan, volume in volumes
            )
        return [
            VolumeResult(scan.case.id, ref) for (scan, _), ref in zip(volumes, refs, strict=True) if ref is not None
        ]

    def end(
        self,
        out: Path,
        results: Sequence[VolumeResult[Ref]],
        models: Models | None,
        trained_on: frozenset[str] | None,
        started: float,
    ) -> Outcome:
        """Report, publish into the run folder, show in Prefect's UI without the folder's path."""
        call = steps.sensitivity_report(
            self.study,
            results,
            trained_on,
            self.runner.failures_for_report(pseudonymous=self.pseudonymous),
            installed_versions(),
            self.runner.notes,
            named=not self.pseudonymous,
        )
        report = self.runner.run("report", call)
        run = RunFolder(
            path=out,
            settings=self.study,
            copies=tuple(copies_of(report, *REPORT_FILES)),
            manifest=lambda: liver_folder.manifest(self.used, models),
            seconds=time.monotonic() - started,
        )
        return finish_run(self.runner, run, ui_artifacts.SENSITIVITY, private=True, useful=bool(results))


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


@define_flow("liver-sensitivity", "sensitivity {study.name}")
def sensitivity(
    request: SensitivityRequest, study: SensitivitySettings, settings: LiverSettings, refresh: bool = False
) -> Outcome:
    """Measure a model's sensitivity to inserted lesions. `settings` are those of `settings_for`."""
    started = time.monotonic()
    stages = SensitivityStages(settings, study, refresh=refresh)
    cases = stages.find(study.healthy, "healthy")
    readable = []
    for case in cases:
        try:
            path_digest(case.scan)
            readable.append(case)
        except UserError as error:
            stages.runner.record_failure(to_case_failure(case.id, "find", error))
    seen = trained_on(request.model, readable)
    if not request.allow_training_cases:
        refuse_training_cases(request.model, seen)
    models = stages.adopt(request.model)
    results = [] if models is None else stages.measure(stages.segment_healthy(readable, models), models)
    return stages.end(request.out, results, models, seen, started)
