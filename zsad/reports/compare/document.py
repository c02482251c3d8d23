"""Document of a comparison: the schema of `report.json`. It contains no path, and no data of single images."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from medad.reporting.failures import FailureRow
from medad.reporting.seed_statistics import Stat
from zsad.clip.models import EncoderInfo
from zsad.config.settings import Ablation
from zsad.reports.published import (
    CategoryFigures,
    PublishedRow,
)
from zsad.reports.run.document import (
    Notice,
    PublishedTable,
    SeedFigures,
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CategoryCounts(_Part):
    name: str
    normal: int
    anomalous: int
    unlabelled: int
    mask_problems: int
    """Number of images left out of the pixel metrics because their masks cannot be used."""


class RankedFigures(_Part):
    """Metrics and ranks in one row of a table."""

    metrics: dict[str, Stat | None]
    """Mean over seeds by key of `METRICS`, of a fraction or of its macro mean over categories."""
    ranks: dict[str, int | None]
    """Rank among the rows of the table by key of `METRICS`; 1 is best.

    Figures that are printed the same have the same rank. A rank is None if the row has no figure, or if its mean
    leaves out a category that others have. Published rows have no rank.
    """


class SystemCategory(RankedFigures):
    seeds: dict[int, SeedFigures]


class MacroFigures(RankedFigures):
    """Macro mean over categories for each seed, and its mean and sd over the seeds. Pixels are never pooled."""

    categories: dict[str, int]
    """Number of categories of each mean."""
    complete: dict[str, bool]
    """Whether each mean includes all categories that any row of the table has."""


class SystemCost(_Part):
    """Time and memory of a system, over all measured categories and seeds."""

    scoring_s_an_image: float
    images: int
    """Number of scored images. Each counts once per seed."""
    peak_memory_bytes: int | None
    memory_bytes_an_image: float | None
    """Largest value over categories of peak memory divided by the number of images of the category."""


class SystemReport(_Part):
    name: str
    system: str
    """Name of the system in a configuration."""
    source: str
    published_setting: str
    encoder: str
    """Name of its encoder in the configuration's `encoders`."""
    made_by: EncoderInfo
    seeded: bool
    """Whether its scores depend on the seed. If not, it has one value and no deviation."""
    trained: bool
    """Whether it was trained on auxiliary data, with labels and masks."""
    mean: MacroFigures
    categories: dict[str, SystemCategory]
    published: tuple[PublishedRow, ...]
    """Published figures of this system."""
    cost: SystemCost | None


class EncoderCost(_Part):
    """Time of an encoder's one pass over the images. All systems and seeds with this encoder share it."""

    name: str
    description: str
    shared_by: tuple[str, ...]
    encoding_s: float
    images: int
    encoding_s_an_image: float


class PairedResult(_Part):
    """Result of one test between two systems. `difference` is a's figure minus b's, a fraction."""

    a: str
    b: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    categories: int
    images: int | None
    reason: str
    """Reason why p is missing; empty if p is given."""


class PairedTable(_Part):
    """All pairs of one test and metric. p_holm is corrected over these pairs."""

    test: Literal["DeLong", "Wilcoxon"]
    metric: str
    pairs: tuple[PairedResult, ...]


class AblationRowReport(_Part):
    label: str
    seeded: bool
    mean: MacroFigures
    published: tuple[PublishedRow, ...]


class AblationReport(_Part):
    ablation: Ablation
    title: str
    varied: str
    encoder: str
    rows: tuple[AblationRowReport, ...]
    published: tuple[PublishedRow, ...]
    """Rows of the paper without a corresponding row here."""
    remark: str


class CompareDocument(_Part):
    """Content of the report; `report.json` has the same fields."""

    schema_version: int
    kind: str
    name: str
    notices: tuple[Notice, ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    categories: tuple[CategoryCounts, ...]
    systems: tuple[SystemReport, ...]
    published: PublishedTable | None
    """Published rows without a corresponding system here."""
    published_by_category: tuple[CategoryFigures, ...]
    encoders: tuple[EncoderCost, ...]
    paired: tuple[PairedTable, ...]
    ablations: tuple[AblationReport, ...]
    failures: tuple[FailureRow, ...]
    metrics: dict[str, str]
    """Titles of the shown metrics by key."""
    definitions: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
