"""The last step of the flow: the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.cache import Ref, Step
from flows.jobs import Job, json_values
from medad.config import LiverSettings


@dataclass(frozen=True)
class Reported:
    """One case's artefacts, for the report."""

    case_id: str
    prepared: Ref
    segmented: Ref
    evaluated: Ref | None
    planted: Ref | None


@dataclass(frozen=True)
class FailedStep:
    """A case that broke a rule: what the report says of it. No folder name: it may hold a patient's."""

    case_id: str
    stage: str
    rule: str
    file: str = ""


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
        ("medad.report:write_report",),
        ("jinja2", "matplotlib", "numpy", "pillow", "scipy"),
        files=("medad/report_template.html",),
    )

    def inputs(self) -> dict[str, Any]:
        def digest(ref: Ref | None) -> str | None:
            return None if ref is None else ref.digest

        return {
            "settings": json_values(self.settings),
            "results": [
                [each.case_id, *map(digest, (each.prepared, each.segmented, each.evaluated, each.planted))]
                for each in self.results
            ],
            "failures": [[each.case_id, each.stage, each.rule, each.file] for each in self.failures],
            "restoration": digest(self.restoration),
            "segmentation": digest(self.segmentation),
            "versions": list(map(list, self.versions)),
            "notes": list(self.notes),
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.report import CaseResult, FailedCase, write_report

        def folder(ref: Ref | None) -> Path | None:
            return None if ref is None else ref.folder()

        write_report(
            out,
            settings=self.settings,
            results=[
                CaseResult(
                    case_id=each.case_id,
                    prepared=each.prepared.folder(),
                    segmented=each.segmented.folder(),
                    evaluated=folder(each.evaluated),
                    planted=folder(each.planted),
                )
                for each in self.results
            ],
            failures=[FailedCase(each.case_id, each.stage, each.rule, each.file) for each in self.failures],
            restoration=folder(self.restoration),
            segmentation=folder(self.segmentation),
            versions=dict(self.versions),
            notes=list(self.notes),
        )
