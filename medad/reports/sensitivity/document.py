"""Content of the report of an inserted-lesion study, made from the records of its volumes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from medad.base.errors import CaseFailure
from medad.base.metric import Metric
from medad.base.settings import MACHINE_FIELDS
from medad.base.storage import read_record
from medad.base.text import hide_paths, natural_order
from medad.config.sensitivity import SensitivitySettings
from medad.evaluation.sensitivity import LesionFigures, Row, VolumeRecord, sensitivity_table, summarise_lesions
from medad.reporting.failures import FailureRow, failure_rows
from medad.reporting.headline import Headline, headline_of
from medad.reports.run.document import INSERTED_REAL, STATEMENT
from medad.steps.results import VolumeResult

SCHEMA_VERSION = 1
UNKNOWN_TRAINING = (
    "The training data of the model is not known. If it contains these scans, the results do not apply to new patients."
)
TRAINED_ON = "The model was trained on some of these scans. Results on these scans do not apply to new patients."
INSERTED_STATEMENT = (
    "This program inserted lesions of known shape and contrast into scans of healthy livers. The results show how well "
    "inserted lesions are found. They are not an estimate for real tumours."
)

HEADLINES = (
    Metric(
        "sensitivity",
        "lesion sensitivity at the fixed false-positive volume",
        "lesion",
        "Sensitivity = found / inserted. Higher is better. The interval is Wilson's 95 % interval (Wilson 1927), "
        "which assumes independent lesions.",
        attrgetter("sensitivity"),
        headline=True,
    ),
    Metric(
        "voxel_auroc_mean",
        "voxel AUROC in the liver",
        "voxel",
        "Area under the ROC curve for the voxels of a lesion against all liver voxels outside lesions. It is "
        "P(lesion voxel has the higher probability) + P(tie) / 2 (Hanley and McNeil 1982), averaged over lesions. "
        "0.5 is chance, 1 is best; higher is better.",
        attrgetter("voxel_auroc_mean"),
        headline=True,
    ),
)
"""Metrics of the headline. `value` reads a `Summary`."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Summary(_Part):
    """Results over all lesions, each counted once."""

    sensitivity: float | None
    low: float | None
    high: float | None
    chance: float | None
    voxel_auroc_mean: float | None
    """Mean voxel AUROC over lesions."""
    dice_mean: float | None
    planned: int
    inserted: int
    found: int


class Inserted(_Part):
    any: bool = True
    tag: str = INSERTED_REAL
    statement: str = INSERTED_STATEMENT


class ScanReport(_Part):
    """Results of one healthy scan over all its inserted volumes."""

    case_id: str
    trained_on: bool
    """True if the model was trained on this scan."""
    volumes: int
    threshold: float
    healthy_false_positive_ml: float
    inserted_false_positive_ml: float
    """Volume marked outside lesions in the scans with lesions, mean over volumes."""
    figures: LesionFigures


class SensitivityDocument(_Part):
    """Complete content of the report. `report.json` has the same fields."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "adflows liver sensitivity report"
    name: str
    statement: tuple[str, ...] = STATEMENT
    inserted: Inserted = Inserted()
    warnings: tuple[str, ...]
    """Warnings shown first."""
    notes: tuple[str, ...]
    headline: tuple[Headline, ...]
    summary: Summary | None
    """Results over all lesions. None: no volume was measured."""
    by_size: tuple[Row, ...]
    by_contrast: tuple[Row, ...]
    by_place: tuple[Row, ...]
    cells: tuple[Row, ...]
    """Rows by size, contrast and place."""
    scans: tuple[ScanReport, ...]
    failures: tuple[FailureRow, ...]
    definitions: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]


def read_volumes(results: Sequence[VolumeResult[Path]]) -> list[tuple[str, VolumeRecord]]:
    """Read records with their case ids, sorted by case, place, contrast and repeat.

    Raises InputError if a record is damaged.
    """
    from medad.steps.inserted import RECORD

    records = [(one.case_id, read_record(VolumeRecord, one.folder / RECORD)) for one in results]
    return sorted(
        records,
        key=lambda pair: (natural_order(pair[0]), pair[1].place, pair[1].contrast.hu, pair[1].repeat, pair[1].bins_mm),
    )


def make_document(
    settings: SensitivitySettings,
    volumes: Sequence[tuple[str, VolumeRecord]],
    *,
    trained_on: frozenset[str] | None,
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
    show_file_names: bool,
) -> SensitivityDocument:
    """Return the report's content.

    Parameters
    ----------
    trained_on
        Cases on which the model was trained. None: not known.
    show_file_names
        True: base names of files with errors may be shown.
    """
    records = [record for _, record in volumes]
    axes = (settings.bins, [one.label for one in settings.contrasts_hu], settings.places)
    cells = sensitivity_table(records, *axes, ("size", "contrast", "place"))
    missing = sum(row.figures.planned - row.figures.inserted for row in cells)
    planned = sum(row.figures.planned for row in cells)
    no_room = (
        f"{missing} of {planned} planned lesions did not fit into these livers and are not counted." if missing else ""
    )
    trained_scans = {case_id for case_id, _ in volumes} & (trained_on or set())
    summary = _summary(sensitivity_table(records, *axes, ())[0].figures) if records else None
    return SensitivityDocument(
        name=settings.name,
        warnings=(UNKNOWN_TRAINING,) if trained_on is None else (TRAINED_ON,) if trained_scans else (),
        notes=tuple(hide_paths(note) for note in (no_room, *notes) if note),
        headline=() if summary is None else headline_of(HEADLINES, lambda metric: metric.value(summary)),
        summary=summary,
        by_size=tuple(sensitivity_table(records, *axes, ("size",))),
        by_contrast=tuple(sensitivity_table(records, *axes, ("contrast",))),
        by_place=tuple(sensitivity_table(records, *axes, ("place",))),
        cells=tuple(cells),
        scans=tuple(_scans(volumes, trained_scans)),
        failures=failure_rows(failures, hide_files=not show_file_names),
        definitions=definitions(settings),
        settings=settings.public(*MACHINE_FIELDS),
        versions={name: hide_paths(versions[name]) for name in sorted(versions)},
    )


def _summary(figures: LesionFigures) -> Summary:
    shared = figures.model_dump(include={"sensitivity", "low", "high", "chance", "planned", "inserted", "found"})
    return Summary(voxel_auroc_mean=figures.voxel_auroc, dice_mean=figures.dice, **shared)


def _scans(volumes: Sequence[tuple[str, VolumeRecord]], trained_scans: Set[str]) -> Iterator[ScanReport]:
    for case_id in dict.fromkeys(case_id for case_id, _ in volumes):
        records = [record for other_id, record in volumes if other_id == case_id]
        lesions = [lesion for record in records for lesion in record.lesions]
        missing = sum(len(record.bins_mm) for record in records) - len(lesions)
        yield ScanReport(
            case_id=case_id,
            trained_on=case_id in trained_scans,
            volumes=len(records),
            threshold=records[0].threshold,
            healthy_false_positive_ml=records[0].healthy_false_positive_ml,
            inserted_false_positive_ml=statistics.fmean(record.inserted_false_positive_ml for record in records),
            figures=summarise_lesions([*lesions, *[None] * missing]),
        )


def definitions(settings: SensitivitySettings) -> dict[str, str]:
    """Return one text per column: its meaning, formula and direction."""
    return {
        "Threshold": (
            f"Lowest probability threshold that marks at most {settings.false_positive_ml:g} mL of the liver "
            "in the scan without lesions. Each scan has its own threshold. Voxels at or above it are marked. It uses "
            "neither tumour labels nor inserted lesions."
        ),
        "Found": (
            f"Number of lesions with at least {settings.overlap:.0%} of their voxels, and at least one voxel, marked "
            "at that threshold. Higher is better. Marked components have no minimum size."
        ),
        "Sensitivity": HEADLINES[0].meaning,
        "By chance": (
            "Share of lesions that would also count as found in the scan without lesions, because the networks mark "
            "that place anyway. Lower is better. Only a sensitivity above this value shows detection."
        ),
        "Voxel AUROC": HEADLINES[1].meaning,
        "Dice": (
            "Overlap of marked and true voxels: Dice = 2 TP / (2 TP + FP + FN) (Dice 1945), averaged over lesions. "
            "TP, FP and FN are true-positive, false-positive and false-negative voxels. Higher is better. Only voxels "
            f"within {settings.surroundings_mm:g} mm of the lesion and outside other lesions count. Over the whole "
            "liver, the fixed false-positive volume would dominate it."
        ),
        "Inserted": (
            "Number of planned lesions that fit into the liver without touching each other. Up to "
            f"{settings.lesions_per_volume} lesions of different sizes and the same contrast are inserted into one "
            "scan. Sizes, shapes and places are the same for all contrasts."
        ),
        "Inside, rim": (
            "Inside: the lesion does not touch the surface of the liver. Rim: the lesion touches or crosses it. Its "
            "ground truth is the part inside the liver; nothing outside is changed. The end of the scan does not count "
            "as a surface."
        ),
        "Mixed": (
            "A lesion with an irregular core of 42 % of its volume. The core has the given contrast, the rim around it "
            "has the opposite contrast, and the transition is smooth."
        ),
    }
