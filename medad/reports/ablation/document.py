"""Schema of an ablation's `report.json`. It contains no paths and no patient data; cases appear under their ids."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from medad.config.ablation import PublishedFigures, PublishedRow
from medad.evaluation.metric_rows import COLUMNS
from medad.reporting.failures import FailureRow
from medad.reporting.seed_statistics import Stat
from medad.reports.run.document import Inserted

SCHEMA_VERSION = 1
KIND = "adflows liver ablation"

FIGURES = {key: metric.title for key, metric in COLUMNS.items()}
"""Column title of each metric, by its key in `medad.evaluation.metrics.Summary`."""
FRACTIONS = tuple(key for key, metric in COLUMNS.items() if metric.fraction)
CASE_FIGURES = {
    "micro_dice_2d": "micro_dice_2d",
    "dice_3d_mean": "dice_3d",
    "voxel_auroc_mean": "voxel_auroc",
}
"""Metrics that are tested, with the name of each in a single case."""

Number = float | int | None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CaseFigures(_Part):
    """Metrics of one case and one seed. None: undefined."""

    case_id: str
    micro_dice_2d: float | None
    dice_3d: float
    voxel_auroc: float | None
    slice_auroc: float | None
    true_lesions: int
    found_lesions: int
    false_positives: int


class SeedFigures(_Part):
    """Metrics of one training over its test cases, by key of `FIGURES`."""

    seed: int
    figures: dict[str, float | None]
    cases: tuple[CaseFigures, ...]


class RowReport(_Part):
    """One table row, or one value of a sweep."""

    name: str
    label: str
    changes: dict[str, Any]
    """Settings that differ from the base, by dotted key."""
    seeded: bool
    """True if the row depends on the seed. Otherwise it has one value and no deviation."""
    seeds: tuple[SeedFigures, ...]
    missing_seeds: tuple[int, ...]
    """Requested seeds that failed. The list of failures has the reasons."""
    stats: dict[str, Stat | None]
    """Mean and sd by key of `FIGURES`. None: the metric is undefined for all seeds."""
    published: PublishedFigures | None


class PairedTest(_Part):
    """Test of row a against row b. The difference is a minus b."""

    a: str
    b: str
    difference: float | None
    sd: float | None
    """Standard deviation of the differences (ddof = 1)."""
    t: float | None
    p: float | None
    """p-value of the two-sided paired t-test. None: undefined, see `reason`."""
    p_holm: float | None
    """p-value after Holm's correction over the pairs of the table."""
    n: int
    """Number of pairs: seeds or cases."""
    reason: str


class PairedTable(_Part):
    """Tests of one metric, paired by seed or by case."""

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
    """Metrics over the number of epochs of phase two."""

    row: str
    """Row for which the epochs are varied. Empty if it is the base."""
    points: tuple[CurvePoint, ...]
    missing_seeds: tuple[int, ...]


class EmbeddedSlices(_Part):
    kind: Literal["tumour", "healthy", "synthesised"]
    x: tuple[float, ...]
    y: tuple[float, ...]


class EmbeddingReport(_Part):
    """Slices by pooled bottleneck features of a restoration network, projected onto two axes."""

    row: str
    seed: int
    explained: tuple[float, float]
    """Share of the variance along each axis, 0 to 1."""
    slices: tuple[EmbeddedSlices, ...]


class BaselineReport(_Part):
    sigma_mm: float
    row: RowReport


class AblationDocument(_Part):
    """Complete content of the report. `report.json` has the same fields."""

    schema_version: int
    kind: str
    name: str
    statement: tuple[str, ...]
    inserted: Inserted
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    figures: dict[str, str]
    """Title of each metric, by key."""
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
