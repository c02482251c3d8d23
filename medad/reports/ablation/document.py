"""`report.json` of an ablation, part by part. No path and no patient data goes in: cases appear under their ids."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from medad.config.ablation import PublishedFigures, PublishedRow
from medad.reporting.failures import FailureRow
from medad.reporting.seed_statistics import Stat
from medad.reports.run.document import Inserted

SCHEMA_VERSION = 1
KIND = "adflows liver ablation"

FIGURES = {
    "micro_dice_2d": "micro 2-D Dice",
    "dice_3d_mean": "3-D Dice, mean over cases",
    "voxel_auroc_mean": "voxel AUROC in the liver",
    "slice_auroc": "slice AUROC",
    "lesion_sensitivity": "lesion sensitivity",
    "false_positives_per_case": "false positives per case",
}
"""Key of `medad.evaluation.metrics.Summary` -> title of its column. All but the last are fractions, higher is
better."""
FRACTIONS = tuple(key for key in FIGURES if key != "false_positives_per_case")
CASE_FIGURES = {
    "micro_dice_2d": "micro_dice_2d",
    "dice_3d_mean": "dice_3d",
    "voxel_auroc_mean": "voxel_auroc",
}
"""Figures that are tested, and what each is of a single case."""

Number = float | int | None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CaseFigures(_Part):
    """One case, one seed; None where a figure is undefined."""

    case_id: str
    micro_dice_2d: float | None
    dice_3d: float
    voxel_auroc: float | None
    slice_auroc: float | None
    true_lesions: int
    found_lesions: int
    false_positives: int


class SeedFigures(_Part):
    """One training: the figures over its test cases, by key of `FIGURES`."""

    seed: int
    figures: dict[str, float | None]
    cases: tuple[CaseFigures, ...]


class RowReport(_Part):
    """A row of a table, a value of a sweep, or a snapshot of the curve."""

    name: str
    label: str
    changes: dict[str, Any]
    """What differs from the base, by dotted key."""
    seeded: bool
    """Whether it depends on the seed. If not it has one value and no deviation."""
    seeds: tuple[SeedFigures, ...]
    missing_seeds: tuple[int, ...]
    """Of those asked for: they failed, for reasons that the list of failures has."""
    stats: dict[str, Stat | None]
    """By key of `FIGURES`; None where no seed defines the figure."""
    published: PublishedFigures | None


class PairedTest(_Part):
    """Row a against row b; the difference is a minus b."""

    a: str
    b: str
    difference: float | None
    sd: float | None
    """Of the differences (ddof = 1)."""
    t: float | None
    p: float | None
    """Two-sided paired t-test. None: undefined, for the reason given."""
    p_holm: float | None
    """Corrected over the pairs of its table."""
    n: int
    """Pairs: seeds, or cases."""
    reason: str


class PairedTable(_Part):
    """One figure, paired in one way."""

    figure: str
    paired_by: Literal["seed", "case"]
    reference: str
    pairs: tuple[PairedTest, ...]


class SweepReport(_Part):
    name: str
    label: str
    key: str
    rows: tuple[RowReport, ...]


class CurvePoint(_Part):
    epochs: int
    stats: dict[str, Stat | None]


class CurveReport(_Part):
    """Figures over the length of phase two."""

    row: str
    """The varied row; empty for the base."""
    points: tuple[CurvePoint, ...]
    missing_seeds: tuple[int, ...]


class EmbeddedSlices(_Part):
    kind: Literal["tumour", "healthy", "synthesised"]
    x: tuple[float, ...]
    y: tuple[float, ...]


class EmbeddingReport(_Part):
    """Slices by pooled bottleneck features of a restoration network, projected to two axes."""

    row: str
    seed: int
    explained: tuple[float, float]
    """Share of the variance along either axis, 0 to 1."""
    slices: tuple[EmbeddedSlices, ...]


class BaselineReport(_Part):
    sigma_mm: float
    row: RowReport


class AblationDocument(_Part):
    """Everything in the report; `report.json` is this, field by field."""

    schema_version: int
    kind: str
    name: str
    statement: tuple[str, ...]
    inserted: Inserted
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    figures: dict[str, str]
    """Key -> title."""
    rows: tuple[RowReport, ...]
    baseline: BaselineReport | None
    published_rows: tuple[PublishedRow, ...]
    paired: tuple[PairedTable, ...]
    sweeps: tuple[SweepReport, ...]
    curve: CurveReport | None
    embedding: EmbeddingReport | None
    failures: tuple[FailureRow, ...]
    definitions: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
