"""What the report of a study of inserted lesions holds, and how it is made from the records of its volumes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from medad.base.errors import CaseFailure
from medad.base.settings import MACHINE_FIELDS
from medad.base.storage import read_record
from medad.base.text import hide_paths, natural_order
from medad.config.sensitivity import SensitivitySettings
from medad.evaluation.sensitivity import Figures, Row, VolumeRecord, figures_of, table
from medad.reporting.failures import ShownFailure, shown_failures
from medad.reports.run.document import INSERTED_REAL, STATEMENT
from medad.steps.results import VolumeResult

SCHEMA_VERSION = 1
UNKNOWN_TRAINING = (
    "What the model was trained on is not known: it may have seen these scans, and what is measured then is no measure "
    "of new patients."
)
TRAINED_ON = "The model was trained on some of these scans: what is measured on them is no measure of new patients."
INSERTED_STATEMENT = (
    "The lesions looked for were drawn into scans of healthy livers by this program, with known shape and contrast. "
    "The figures tell how well inserted lesions are found; they are no estimate for tumours."
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Summary(_Part):
    """All lesions together, each counted once."""

    sensitivity: float | None
    low: float | None
    high: float | None
    chance: float | None
    voxel_auroc_mean: float | None
    """Mean over lesions."""
    dice_mean: float | None
    planned: int
    inserted: int
    found: int


class Inserted(_Part):
    any: bool = True
    tag: str = INSERTED_REAL
    statement: str = INSERTED_STATEMENT


class ScanReport(_Part):
    """One healthy scan, over the volumes inserted into it."""

    case_id: str
    trained_on: bool
    """Whether the model had seen this scan in training."""
    volumes: int
    threshold: float
    healthy_false_positive_ml: float
    inserted_false_positive_ml: float
    """Marked outside lesions once these are there: mean over volumes."""
    figures: Figures


class SensitivityDocument(_Part):
    """Everything in the report; `report.json` is this, field by field."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "adflows liver sensitivity report"
    name: str
    statement: tuple[str, ...] = STATEMENT
    inserted: Inserted = Inserted()
    warnings: tuple[str, ...]
    """What a reader must know first."""
    notes: tuple[str, ...]
    summary: Summary | None
    """None when no volume was measured."""
    by_size: tuple[Row, ...]
    by_contrast: tuple[Row, ...]
    by_place: tuple[Row, ...]
    cells: tuple[Row, ...]
    """Size, contrast and place."""
    scans: tuple[ScanReport, ...]
    failures: tuple[ShownFailure, ...]
    definitions: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]


def read_volumes(results: Sequence[VolumeResult[Path]]) -> list[tuple[str, VolumeRecord]]:
    """Records with their cases, by case, place, contrast and repeat. Raises InputError for a damaged one."""
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
    named: bool,
) -> SensitivityDocument:
    """The report's content.

    Parameters
    ----------
    trained_on
        Cases that the model had seen in training. None: nobody knows.
    named
        Whether the base names of offending files may be shown.
    """
    records = [record for _, record in volumes]
    axes = (settings.bins, [one.label for one in settings.contrasts_hu], settings.places)
    cells = table(records, *axes, ("size", "contrast", "place"))
    missing = sum(row.figures.planned - row.figures.inserted for row in cells)
    asked = sum(row.figures.planned for row in cells)
    no_room = f"{missing} of {asked} lesions found no room in these livers and are in no figure." if missing else ""
    seen = {case_id for case_id, _ in volumes} & (trained_on or set())
    return SensitivityDocument(
        name=settings.name,
        warnings=(UNKNOWN_TRAINING,) if trained_on is None else (TRAINED_ON,) if seen else (),
        notes=tuple(hide_paths(note) for note in (no_room, *notes) if note),
        summary=_summary(table(records, *axes, ())[0].figures) if records else None,
        by_size=tuple(table(records, *axes, ("size",))),
        by_contrast=tuple(table(records, *axes, ("contrast",))),
        by_place=tuple(table(records, *axes, ("place",))),
        cells=tuple(cells),
        scans=tuple(_scans(volumes, seen)),
        failures=shown_failures(failures, hidden=not named),
        definitions=definitions(settings),
        settings=settings.public(*MACHINE_FIELDS),
        versions={name: hide_paths(versions[name]) for name in sorted(versions)},
    )


def _summary(figures: Figures) -> Summary:
    kept = figures.model_dump(include={"sensitivity", "low", "high", "chance", "planned", "inserted", "found"})
    return Summary(voxel_auroc_mean=figures.voxel_auroc, dice_mean=figures.dice, **kept)


def _scans(volumes: Sequence[tuple[str, VolumeRecord]], seen: Set[str]) -> Iterator[ScanReport]:
    for case_id in dict.fromkeys(case_id for case_id, _ in volumes):
        own = [record for of, record in volumes if of == case_id]
        lesions = [lesion for record in own for lesion in record.lesions]
        missing = sum(len(record.bins_mm) for record in own) - len(lesions)
        yield ScanReport(
            case_id=case_id,
            trained_on=case_id in seen,
            volumes=len(own),
            threshold=own[0].threshold,
            healthy_false_positive_ml=own[0].healthy_false_positive_ml,
            inserted_false_positive_ml=statistics.fmean(record.inserted_false_positive_ml for record in own),
            figures=figures_of([*lesions, *[None] * missing]),
        )


def definitions(settings: SensitivitySettings) -> dict[str, str]:
    """What each figure means, one text a column."""
    return {
        "Threshold": (
            "One a scan, taken from the scan without inserted lesions: the lowest probability from which on no more "
            f"than {settings.false_positive_ml:g} mL of its liver is marked. Voxels of one probability are marked "
            "together or not at all. It needs no label of a tumour, and no inserted lesion has a part in it."
        ),
        "Found": (
            f"At least {settings.overlap:.0%} of the lesion's voxels, and one at least, are marked in the scan with "
            "the lesion at that threshold. No smallest size of a component is asked for."
        ),
        "Sensitivity": "Found of inserted. The interval is Wilson's at 95 %, as if lesions were independent.",
        "By chance": (
            "The share of lesions whose voxels would have counted as found in the scan without them: what lies where "
            "the networks mark anyway. A sensitivity no higher than this shows nothing."
        ),
        "Voxel AUROC": (
            "The lesion's voxels against all voxels of that liver outside lesions, exact, ties counting half; mean "
            "over lesions. 0.5 is chance, 1 is best."
        ),
        "Dice": (
            f"Of marked and true voxels within {settings.surroundings_mm:g} mm of the lesion, outside other lesions; "
            "mean over lesions. Over the whole liver the fixed false-positive volume would decide it."
        ),
        "Inserted": (
            "Lesions asked for that found room in the liver, clear of each other. Up to "
            f"{settings.lesions_per_volume} of different sizes are inserted at a time, all of one contrast; for every "
            "contrast they have the same sizes, shapes and places."
        ),
        "Inside, rim": (
            "Inside: clear of the liver's surface. Rim: touching or crossing it; truth is the part inside the liver, "
            "and nothing outside is changed. Where the scan ends is no surface."
        ),
        "Mixed": (
            "The contrast in an irregular core with 42 % of the volume, its opposite in the rim around it, smooth "
            "between."
        ),
    }
