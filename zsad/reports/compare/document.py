"""`report.json` of a comparison, part by part. No path goes in, and no image but by number."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from medad.reporting.failures import ShownFailure
from medad.reporting.figures import Stat
from zsad.clip.models import MadeBy
from zsad.config.compare import Ablation
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
    """Images left out of the pixel figures, for their mask is unusable."""


class RankedFigures(_Part):
    """A row of a table."""

    metrics: dict[str, Stat | None]
    """By key of `METRICS`: mean over seeds of a fraction, or of its macro mean over categories."""
    ranks: dict[str, int | None]
    """Among the rows of the table, 1 the best, by the figures as they are printed: what prints alike ranks alike.
    None: no figure, or a mean over fewer categories than others have. Published rows have no rank."""


class SystemCategory(RankedFigures):
    seeds: dict[int, SeedFigures]


class MacroFigures(RankedFigures):
    """The macro mean over categories, seed by seed, and its mean and sd over the seeds; pixels are never pooled."""

    categories: dict[str, int]
    """How many categories each mean is of."""
    complete: dict[str, bool]
    """Whether those are all that any row of the table has."""


class SystemCost(_Part):
    """Means over all categories and seeds that were measured."""

    scoring_s_an_image: float
    images: int
    """Scored, each once a seed."""
    peak_memory_bytes: int | None
    memory_bytes_an_image: float | None
    """The largest of peak memory through the images of its category."""


class SystemReport(_Part):
    name: str
    system: str
    """Its name in a configuration."""
    source: str
    published_setting: str
    encoder: str
    """A name of the configuration's `encoders`."""
    made_by: MadeBy
    seeded: bool
    """Whether its scores depend on the seed. If not, it has one value and no deviation."""
    trained: bool
    """On auxiliary data, with labels and masks."""
    mean: MacroFigures
    categories: dict[str, SystemCategory]
    published: tuple[PublishedRow, ...]
    """What papers print for it."""
    cost: SystemCost | None


class EncoderCost(_Part):
    """One pass over the images, whatever number of systems and seeds use its features."""

    name: str
    description: str
    shared_by: tuple[str, ...]
    encoding_s: float
    images: int
    encoding_s_an_image: float


class PairedResult(_Part):
    """Two systems by one test. `difference` is a's figure minus b's, a fraction."""

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
    """Why there is no p."""


class PairedTable(_Part):
    """All pairs; p_holm is corrected over them."""

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
    """Rows of the paper that none of ours stands for."""
    remark: str


class CompareDocument(_Part):
    """Everything in the report; `report.json` is this, field by field."""

    schema_version: int
    kind: str
    name: str
    notices: tuple[Notice, ...]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    categories: tuple[CategoryCounts, ...]
    systems: tuple[SystemReport, ...]
    published: PublishedTable | None
    """Rows that no system here stands for."""
    published_by_category: tuple[CategoryFigures, ...]
    encoders: tuple[EncoderCost, ...]
    paired: tuple[PairedTable, ...]
    ablations: tuple[AblationReport, ...]
    failures: tuple[ShownFailure, ...]
    metrics: dict[str, str]
    """Key -> title of the figures shown."""
    definitions: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
