"""The flow liver-sensitivity: lesions of known size and contrast, inserted into healthy scans, segmented by a model.

Each scan is segmented once without lesions, which fixes its threshold, and once for each volume with inserted lesions.
A volume that breaks a rule is left out and listed as a failure. The report is written even if volumes failed.
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
from flows.liver.split import Split, salted_member, trained_members, training_rows
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
from medad.steps.results import Model, Segmenter, VolumeResult

if TYPE_CHECKING:
    from medad.cohort.datasets import Case, LabelledScan

REPORT_FILES = ("report.html", "report.json", "lesions.csv", "sensitivity.csv", "sensitivity.tex", "preview.png")


class SensitivityRequest(BaseModel):
    """The model to measure. Prefect stores a flow's parameters as JSON, so all paths here are private."""

    model: PrivatePath
    """Folder of an earlier run."""
    out: PrivatePath
    allow_training_cases: bool = False
    """Whether scans are allowed that the model was trained on. The report then begins with a warning."""


@dataclass(frozen=True)
class Healthy:
    """A healthy scan and its segmentation without inserted lesions."""

    case: Case
    scan: LabelledScan
    segmented: Ref


class SensitivityStages(Stages):
    """The stages of the liver flow and of a sensitivity study."""

    def __init__(self, settings: LiverSettings, study: SensitivitySettings, *, refresh: bool) -> None:
        super().__init__(settings, refresh=refresh)
        self.study = study

    def run_in_order(self, calls: Iterable[tuple[str, Call]]) -> list[Ref | None]:
        """Run calls on devices, one per device at a time. Returns results in order, with None for failed calls."""
        waiting: deque[SubmittedCall] = deque()
        found: list[Ref | None] = []
        for label, call in calls:
            if len(waiting) >= self.runner.max_device_calls:
                found.append(waiting.popleft().ref())
            waiting.append(self.runner.submit(label, call))
        return found + [task.ref() for task in waiting]

    def segment_healthy(self, cases: Sequence[Case], model: Model[Ref]) -> list[Healthy]:
        """Prepare and segment the scans without inserted lesions."""
        from medad.cohort.datasets import LabelledScan

        settings = self.settings
        scans = [LabelledScan.of(case, self.study.healthy) for case in cases]
        tasks = [
            self.runner.submit(
                case.id,
                steps.prepare(scan, settings.preprocess, training=False, exclude=settings.inference.exclude),
            )
            for case, scan in zip(cases, scans, strict=True)
        ]
        ready = []
        for case, scan, task in zip(cases, scans, tasks, strict=True):
            if (prepared := task.ref()) is not None:
                self.used.append(self._used("test", case.id, prepared))
                call = steps.segment(prepared, model, settings.inference, settings.postprocess, settings.machine)
                ready.append((case, scan, call))
        with terminal.stages({steps.SEGMENT.name: len(ready)}):
            segmented = self.run_in_order([(case.id, call) for case, _, call in ready])
        return [
            Healthy(case, scan, ref) for (case, scan, _), ref in zip(ready, segmented, strict=True) if ref is not None
        ]

    def measure(self, scans: Sequence[Healthy], model: Model[Ref]) -> list[VolumeResult[Ref]]:
        """Insert every volume of the study into every scan, segment and measure it."""
        study, settings = self.study, self.settings
        segmenter = Segmenter(settings.preprocess, model, settings.inference, settings.postprocess)
        volumes = [(scan, volume) for scan in scans for volume in study.volumes()]
        with terminal.stages({steps.MEASURE.name: len(volumes)}):
            refs = self.run_in_order(
                (
                    f"{scan.case.id}, {volume.label}",
                    steps.measure(
                        scan.scan, volume, study.measure_settings, scan.segmented, segmenter, settings.machine
                    ),
                )
                for scan, volume in volumes
            )
        return [
            VolumeResult(scan.case.id, ref) for (scan, _), ref in zip(volumes, refs, strict=True) if ref is not None
        ]

    def finish_study(
        self,
        out: Path,
        results: Sequence[VolumeResult[Ref]],
        model: Model[Ref] | None,
        trained_on: frozenset[str] | None,
        started: float,
    ) -> Outcome:
        """Write the report, publish it into the run folder, and show it in Prefect's UI without the folder's path."""
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
            manifest=lambda: liver_folder.manifest(self.used, model),
            seconds=time.monotonic() - started,
        )
        return finish_run(self.runner, run, ui_artifacts.SENSITIVITY, private=True, useful=bool(results))


def settings_for(study: SensitivitySettings, model: Path) -> LiverSettings:
    """Return the settings of the model's run with the study's scans, machine settings and changes.

    Raises
    ------
    ConfigError
        The folder has no model, or a value breaks a rule.
    """
    of_model = liver_folder.settings_of_run(model)
    settings = liver_folder.settings_with_changes(of_model, study.settings_by_key, model=model, source="settings")
    machine = {name: getattr(study, name) for name in MACHINE_FIELDS}
    return settings.model_copy(update={"name": study.name, "test_data": study.healthy, "folds": None, **machine})


def trained_on(model: Path, cases: Sequence[Case]) -> frozenset[str] | None:
    """Return the ids of cases whose scan or patient is in the training data of the run in folder `model`.

    None if the run's manifest does not list its training cases.
    """
    rows = training_rows(model)
    if not rows:
        return None
    split = Split.of((), cases).with_salted()
    tested = [salted_member(member, split.salted.get(("test", member.case_id))) for member in split.members("test")]
    trained = trained_members(rows)
    return frozenset(member.case_id for member in tested if find_leaks(trained, [member]))


def refuse_training_cases(model: Path, training_cases: frozenset[str] | None) -> None:
    """Raise ConfigError if the model was trained on cases of the study, or if that is unknown (None)."""
    if training_cases is None:
        raise ConfigError(
            f"{model}: {MANIFEST} names no training scan, so the study's scans may be among them; give the folder of "
            "the run that trained the model, or --allow-training-cases"
        )
    if training_cases:
        raise ConfigError(
            f"{model}: was trained on {', '.join(sorted(training_cases))}; give other healthy scans, "
            "or --allow-training-cases"
        )


@define_flow("liver-sensitivity", "sensitivity {study.name}")
def sensitivity(
    request: SensitivityRequest, study: SensitivitySettings, settings: LiverSettings, refresh: bool = False
) -> Outcome:
    """Measure a model's sensitivity to inserted lesions. `settings` come from `settings_for`."""
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
    training_cases = trained_on(request.model, readable)
    if not request.allow_training_cases:
        refuse_training_cases(request.model, training_cases)
    model = stages.adopt(request.model)
    results = [] if model is None else stages.measure(stages.segment_healthy(readable, model), model)
    return stages.finish_study(request.out, results, model, training_cases, started)
