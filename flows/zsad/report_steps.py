"""The last steps of the flow zsad: the report, and what `score` leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.store.artifacts import Ref, Step
from flows.store.step import PAGE, FailedStep, Job
from flows.zsad.steps import Image, label_of
from medad.base.settings import MACHINE_FIELDS
from zsad.config.run import ZsadSettings


@dataclass(frozen=True)
class ScoredCategory:
    """One category's artefacts, for the report."""

    name: str
    images: tuple[Image, ...]
    """Those with features; equal contents under several names are several images."""
    text: Ref
    features: Ref
    scores: tuple[tuple[int, Ref], ...]
    """By seed."""
    evaluated: tuple[tuple[int, Ref], ...]

    def inputs(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "images": [[image.id, image.sha256, *label_of(image)] for image in self.images],
            "text": self.text.digest,
            "features": self.features.digest,
            "scores": [[seed, ref.digest] for seed, ref in self.scores],
            "evaluated": [[seed, ref.digest] for seed, ref in self.evaluated],
        }

    def result(self) -> Any:
        """As the report takes it."""
        from zsad.reports.run.data import CategoryResult, ReportImage

        return CategoryResult(
            name=self.name,
            images=tuple(ReportImage(i.id, i.sha256, i.path, i.anomalous, i.defect, i.mask) for i in self.images),
            text=self.text.folder(),
            features=self.features.folder(),
            scores={seed: ref.folder() for seed, ref in self.scores},
            evaluated={seed: ref.folder() for seed, ref in self.evaluated},
        )


_DRAWING = ("jinja2", "matplotlib", "numpy", "pillow", "scipy")
_TEMPLATES = (
    *PAGE,
    "zsad/reports/report_style.html",
    "zsad/reports/report_end.html",
    "zsad/reports/run/report_template.html",
)


@dataclass(frozen=True)
class ZsadReport(Job):
    """The report and its tables. What it shows is what it depends on, ids included."""

    settings: ZsadSettings
    categories: tuple[ScoredCategory, ...]
    failures: tuple[FailedStep, ...]
    versions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    step = Step("zsad-report", 1, ("zsad.reports.run.report:write_report",), _DRAWING, files=_TEMPLATES)

    def inputs(self) -> dict[str, Any]:
        return {
            "settings": self.settings.public(*MACHINE_FIELDS),
            "categories": [category.inputs() for category in self.categories],
            "failures": [[f.category, f.case_id, f.stage, f.rule, f.file] for f in self.failures],
            "versions": list(map(list, self.versions)),
            "notes": list(self.notes),
        }

    def run(self, out: Path, *, key: str) -> None:
        from zsad.reports.run.report import write_report

        write_report(
            out,
            settings=self.settings,
            categories=[category.result() for category in self.categories],
            failures=[failed_shown(failure) for failure in self.failures],
            versions=dict(self.versions),
            notes=self.notes,
        )


@dataclass(frozen=True)
class ScoreOutputs(Job):
    """Of unlabelled images: scores.csv, heat maps, report."""

    settings: ZsadSettings
    category: ScoredCategory | None
    failures: tuple[FailedStep, ...]
    versions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    formats: tuple[Literal["png", "tiff", "npy"], ...]
    step = Step(
        "zsad-maps",
        1,
        ("zsad.reports.run.outputs:write_score_outputs",),
        (*_DRAWING, "torch"),
        files=_TEMPLATES,
    )

    def inputs(self) -> dict[str, Any]:
        return {
            "settings": self.settings.public(*MACHINE_FIELDS),
            "category": None if self.category is None else self.category.inputs(),
            "failures": [[f.category, f.case_id, f.stage, f.rule, f.file] for f in self.failures],
            "versions": list(map(list, self.versions)),
            "notes": list(self.notes),
            "formats": list(self.formats),
        }

    def run(self, out: Path, *, key: str) -> None:
        from flows.devices.progress import count_images
        from zsad.reports.run.outputs import write_score_outputs

        write_score_outputs(
            out,
            settings=self.settings,
            category=None if self.category is None else self.category.result(),
            failures=[failed_shown(failure) for failure in self.failures],
            versions=dict(self.versions),
            notes=self.notes,
            formats=self.formats,
            on_progress=count_images(),
        )


def failed_shown(failure: FailedStep) -> Any:
    """A failure as a report takes it."""
    from zsad.reports.run.data import Failed

    own = failure.case_id.removeprefix(f"{failure.category}/") if failure.category else ""
    return Failed(failure.category or failure.case_id, own, failure.stage, failure.rule, failure.file)
