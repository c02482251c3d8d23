"""The steps of a study of planted lesions, beside those of the liver flow that it shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.liver.steps import Prepare, Segment
from flows.store.artifacts import Ref, Step
from flows.store.step import PAGE, DeviceJob, FailedStep, Job, json_values
from medad.base.settings import ANY_MACHINE, MACHINE_FIELDS, MachineSettings
from medad.config.sensitivity import MeasureSettings, PlantingSettings, SensitivitySettings

if TYPE_CHECKING:
    from flows.devices.child import Place
    from medad.cohort.datasets import Case


@dataclass(frozen=True)
class MeasurePlanted(DeviceJob):
    """Lesions into a healthy scan, prepared and segmented as that scan was, measured. Only figures stay."""

    prepare: Prepare
    segment: Segment
    """Of the scan without lesions."""
    healthy: Ref
    """What `segment` made."""
    planting: PlantingSettings
    measure: MeasureSettings
    machine: MachineSettings = ANY_MACHINE
    kind = "inference"
    step = Step(
        "sensitivity",
        1,
        ("medad.steps.inserted:measure_planted", "medad.steps.cases:prepare_case", "medad.steps.cases:segment_case"),
        (*("monai", "nibabel", "numpy", "safetensors", "scikit-image", "scipy", "SimpleITK", "torch"),),
    )

    def inputs(self) -> dict[str, Any]:
        return self.prepare.inputs() | {
            "segment": self.segment.inputs(),
            "healthy": self.healthy.digest,
            "planting": json_values(self.planting),
            "measure": json_values(self.measure),
        }

    @property
    def batch_size(self) -> int:
        return self.segment.batch_size

    def run_on(self, out: Path, place: Place) -> None:
        from medad.steps.cases import PREPARED, PROBABILITY, prepare_case
        from medad.steps.inserted import measure_planted

        prepare = self.prepare

        def segment(planted: Case, work: Path) -> Path:
            prepare_case(planted, prepare.data, prepare.settings, work, training=False)
            assert (work / PREPARED).is_file()
            segmented = work / "segmented"
            segmented.mkdir()
            self.segment.segment_folder(work, segmented, place)
            return segmented / PROBABILITY

        measure_planted(
            prepare.case,
            prepare.data,
            self.planting,
            self.measure,
            self.healthy.folder() / PROBABILITY,
            segment,
            out,
        )


@dataclass(frozen=True)
class MeasuredVolume:
    """One planted volume, for the report."""

    case_id: str
    measured: Ref


@dataclass(frozen=True)
class SensitivityReport(Job):
    """The tables and the picture. What it shows is what it depends on, case ids included."""

    settings: SensitivitySettings
    results: tuple[MeasuredVolume, ...]
    trained_on: tuple[str, ...] | None
    """Cases that the model had seen; None where nobody knows."""
    failures: tuple[FailedStep, ...]
    versions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    named: bool
    """Whether names of files may be shown."""
    step = Step(
        "sensitivity-report",
        1,
        ("medad.reports.sensitivity.report:write_sensitivity_report",),
        ("jinja2", "matplotlib", "scipy"),
        files=(*PAGE, "medad/reports/report_style.html", "medad/reports/sensitivity/sensitivity_template.html"),
    )

    def inputs(self) -> dict[str, Any]:
        return {
            "settings": self.settings.public(*MACHINE_FIELDS),
            "results": [[each.case_id, each.measured.digest] for each in self.results],
            "trained_on": None if self.trained_on is None else list(self.trained_on),
            "failures": [[each.case_id, each.stage, each.rule, each.file] for each in self.failures],
            "versions": list(map(list, self.versions)),
            "notes": list(self.notes),
            "named": self.named,
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.reports.sensitivity.report import FailedCase, VolumeResult, write_sensitivity_report

        write_sensitivity_report(
            out,
            settings=self.settings,
            results=[VolumeResult(each.case_id, each.measured.folder()) for each in self.results],
            trained_on=None if self.trained_on is None else frozenset(self.trained_on),
            failures=[FailedCase(each.case_id, each.stage, each.rule, each.file) for each in self.failures],
            versions=dict(self.versions),
            notes=self.notes,
            named=self.named,
        )
