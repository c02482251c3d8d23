"""The last step of the liver flow: the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.store.artifacts import Ref, Step
from flows.store.step import PAGE, FailedStep, Job, digest_of, folder_of
from medad.base.settings import MACHINE_FIELDS
from medad.config.liver import LiverSettings


@dataclass(frozen=True)
class Reported:
    """One case's artefacts, for the report."""

    case_id: str
    prepared: Ref
    segmented: Ref
    evaluated: Ref | None
    planted: Ref | None


@dataclass(frozen=True)
class Report(Job):
    """report.html and report.json. What it shows is what it depends on, case ids included."""

    settings: LiverSettings
    results: tuple[Reported, ...]
    failures: tuple[FailedStep, ...]
    restoration: Ref | None
    segmentation: Ref | None
    versions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    step = Step(
        "report",
        1,
        ("medad.reports.run.report:write_report",),
        ("jinja2", "matplotlib", "numpy", "pillow", "scipy"),
        files=(*PAGE, "medad/reports/report_style.html", "medad/reports/run/report_template.html"),
    )

    def inputs(self) -> dict[str, Any]:
        return {
            "settings": self.settings.public(*MACHINE_FIELDS),
            "results": [
                [each.case_id, *map(digest_of, (each.prepared, each.segmented, each.evaluated, each.planted))]
                for each in self.results
            ],
            "failures": [[each.case_id, each.stage, each.rule, each.file] for each in self.failures],
            "restoration": digest_of(self.restoration),
            "segmentation": digest_of(self.segmentation),
            "versions": list(map(list, self.versions)),
            "notes": list(self.notes),
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.reports.run.report import CaseResult, FailedCase, write_report

        write_report(
            out,
            settings=self.settings,
            results=[
                CaseResult(
                    case_id=each.case_id,
                    prepared=each.prepared.folder(),
                    segmented=each.segmented.folder(),
                    evaluated=folder_of(each.evaluated),
                    planted=folder_of(each.planted),
                )
                for each in self.results
            ],
            failures=[FailedCase(each.case_id, each.stage, each.rule, each.file) for each in self.failures],
            restoration=folder_of(self.restoration),
            segmentation=folder_of(self.segmentation),
            versions=dict(self.versions),
            notes=list(self.notes),
        )
