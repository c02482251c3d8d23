"""Document of a report: the schema of `report.json`, and its creation from the results of a run.

It contains no path; images are identified by their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from medad.base.settings import MACHINE_FIELDS
from medad.base.text import hide_paths
from medad.reporting.failures import FailureRow
from medad.reporting.headline import Headline, headline_of
from medad.reporting.seed_statistics import Stat
from zsad.clip.models import EncoderInfo
from zsad.config.run import EvaluationSettings
from zsad.config.settings import ZsadSettings
from zsad.config.system_base import ONLY_VARIANT, SystemSettings
from zsad.evaluation.metric_rows import METRICS, definitions, shown_metrics
from zsad.reports.comparable import reasons_not_comparable
from zsad.reports.published import TITLES, PublishedRow, published_rows
from zsad.scorers.dual.settings import DualImage
from zsad.steps.evaluate import CategoryCurves

SCHEMA_VERSION = 1

RANDOM_NOTICE = (
    "Random weights. The encoder was never trained. All figures and maps here only test the program. They say nothing "
    "about the method or the images."
)
EMBEDDED_NOTICE = (
    "Embedded model. The encoder is the small model that comes with this program. It was trained on generated pictures "
    "so that the flow runs without a download. These are not results of the published method: that uses a CLIP model "
    "trained on hundreds of millions of photographs."
)

VARIANTS: dict[str, str] = {
    "text": "patches and class token are compared with the prompts, without a reference image",
    "text_tta": "text, with test-time adaptation",
    "visual": "each patch is compared with the nearest patch of a reference image, without text",
    "joint": "text and reference image",
    "joint_tta": "text and reference image, with test-time adaptation (the complete method)",
}


def variant_titles(system: SystemSettings) -> dict[str, str]:
    """Return a sentence on each score that a system gives an image, by variant."""
    return {**VARIANTS, ONLY_VARIANT: f"{system.title} ({system.source})"}


Rank = Literal[
    "highest anomalous",
    "median anomalous",
    "lowest anomalous",
    "highest normal",
    "median normal",
    "highest",
    "median",
    "lowest",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Notice(_Part):
    kind: Literal["random weights", "embedded model", "published"]
    text: str


class SeedFigures(_Part):
    """Figures of one variant of one category with one seed."""

    metrics: dict[str, float | None]
    """Metrics by key of `METRICS`; fractions."""
    image_oracle_threshold: float | None
    pixel_oracle_threshold: float | None
    deployable_threshold: float | None
    flagged: int | None
    """Number of images with a score at or above the deployable threshold."""
    found: int | None
    """Number of flagged images that are anomalous. None: some images have no label."""
    false_alarms: int | None
    deployable_f1: float | None


class VariantFigures(_Part):
    variant: str
    seeds: dict[int, SeedFigures]
    metrics: dict[str, Stat | None]
    deployable_threshold: Stat | None
    deployable_f1: Stat | None
    flagged: Stat | None
    found: Stat | None
    false_alarms: Stat | None


class ImageScores(_Part):
    id: str
    anomalous: bool | None
    defect: str
    scores: dict[str, dict[int, float]]
    """Score of the image by variant and seed."""


class ShownImage(_Part):
    """An image that the HTML page shows."""

    rank: Rank
    id: str
    defect: str
    anomalous: bool | None
    score: float
    flagged: bool | None
    """Whether the score reaches the deployable threshold."""
    reference: str | None
    """Id of the reference image shown next to it."""
    masked: bool


class MaskProblem(_Part):
    """An image that is left out of the pixel metrics because of its mask."""

    id: str
    rule: str


class UsedPrompts(_Part):
    """The texts with which the images of a category were compared."""

    words: str
    """Name of the object in the texts."""
    domains: tuple[str, ...] = ()
    """Words for the kind of picture in the texts, if the style has any."""
    normal: tuple[str, ...]
    anomalous: tuple[str, ...]


class CategoryReport(_Part):
    name: str
    encoder: str
    """Description of the encoder that made the features."""
    images: tuple[ImageScores, ...]
    normal: int
    anomalous: int
    unlabelled: int
    masks: int
    mask_problems: tuple[MaskProblem, ...]
    prompts: UsedPrompts | None
    """Texts that the system compares the images with. None: it reads no prompts."""
    variants: tuple[VariantFigures, ...]
    shown_seed: int
    """Seed of the pictures, the histogram and the curves."""
    curves: CategoryCurves
    """ROC and precision-recall curves of the last variant with the shown seed; at most about 400 points each."""
    shown: tuple[ShownImage, ...]


class Macro(_Part):
    """Mean over categories, then over seeds."""

    variant: str
    metrics: dict[str, Stat | None]
    categories: dict[str, int]
    """Number of categories of each mean."""
    deployable_f1: Stat | None


class ColourScale(_Part):
    """Colour scale of all heat maps."""

    variant: str
    seed: int
    low: float
    high: float


class PublishedTable(_Part):
    benchmark: str
    comparable: bool
    """Whether no known difference from the published setting exists. A notice lists the differences."""
    rows: tuple[PublishedRow, ...]


class ReportDocument(_Part):
    """Content of the report; `report.json` has the same fields."""

    schema_version: int
    kind: str
    name: str
    notices: tuple[Notice, ...]
    notes: tuple[str, ...]
    encoders: tuple[EncoderInfo, ...]
    seeds: tuple[int, ...]
    headline: tuple[Headline, ...]
    """Figures of the last variant."""
    macro: tuple[Macro, ...]
    """Means over categories by variant. Empty if no image has a label."""
    published: PublishedTable | None
    colour_scale: ColourScale | None
    categories: tuple[CategoryReport, ...]
    failures: tuple[FailureRow, ...]
    metrics: dict[str, str]
    """Titles of the shown metrics by key."""
    definitions: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]


def make_document(
    settings: ZsadSettings,
    categories: Sequence[CategoryReport],
    encoders: Sequence[EncoderInfo],
    macro: Sequence[Macro],
    colour_scale: ColourScale | None,
    failures: Sequence[FailureRow],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> ReportDocument:
    """Return the document from its parts, which are already sorted."""
    distinct = tuple(dict.fromkeys(encoders))
    notices = notices_of(settings, distinct)
    published = None
    if settings.published is not None and isinstance(settings.method, DualImage):
        scored = {one.name: len(one.images) for one in categories}
        reasons = reasons_not_comparable(settings, settings.published, scored)
        published = PublishedTable(
            benchmark=TITLES[settings.published], comparable=not reasons, rows=published_rows(settings.published)
        )
        if reasons:
            text = f"The published rows are not comparable with this run for these reasons: {'; '.join(reasons)}."
            notices.append(Notice(kind="published", text=text))
    return ReportDocument(
        schema_version=SCHEMA_VERSION,
        kind="adflows zsad report",
        name=settings.name,
        notices=tuple(notices),
        notes=tuple(hide_paths(note) for note in notes),
        encoders=distinct,
        seeds=tuple(sorted({seed for one in categories for figures in one.variants for seed in figures.seeds})),
        headline=headline_of(METRICS.values(), lambda metric: _mean(macro[-1], metric.key)) if macro else (),
        macro=tuple(macro),
        published=published,
        colour_scale=colour_scale,
        categories=tuple(categories),
        failures=tuple(failures),
        metrics=shown_metrics(pro_200=settings.evaluation.pro_200),
        definitions={
            term: text for term, text in definitions_shown(settings.evaluation).items() if macro or term in _UNMEASURED
        },
        settings=settings.public(*MACHINE_FIELDS),
        versions={name: hide_paths(versions[name]) for name in sorted(versions)},
    )


def _mean(macro: Macro, key: str) -> float | None:
    stat = macro.metrics[key]
    return None if stat is None else stat.mean


_UNMEASURED = {"Deployable threshold"}
"""Terms that a report uses even if the images have no labels."""


def notices_of(settings: ZsadSettings, encoders: Sequence[EncoderInfo]) -> list[Notice]:
    """Return the notices on the encoder that every output must show, even without results. Empty for CLIP."""
    notices = []
    if settings.encoder.seed is not None or any(one.random_weights for one in encoders):
        notices.append(Notice(kind="random weights", text=RANDOM_NOTICE))
    if settings.encoder.model == "embedded" or any(one.embedded for one in encoders):
        notices.append(Notice(kind="embedded model", text=EMBEDDED_NOTICE))
    return notices


def definitions_shown(evaluation: EvaluationSettings) -> dict[str, str]:
    """Return the definition of each term of a report, with these settings."""
    size = evaluation.size_px
    return definitions(evaluation.max_fpr) | {
        "± over seeds": (
            "Sample standard deviation (n - 1) over seeds. The seed decides the reference images and pseudo anomalies. "
            "For means over categories, the mean is computed for each seed first."
        ),
        "Deployable threshold": (
            "A threshold on the image score that needs no labels of the images: a given value, one from normal images, "
            "or a quantile of the category's scores. Images with this score or more are flagged. A category with too "
            "few images has no quantile. From normal images: each is scored by the others (leave one out), and the "
            "threshold is that of split conformal prediction (Papadopoulos et al. 2002, Lei et al. 2018). About "
            f"{evaluation.false_alarm_rate:g} of further normal images are flagged, or fewer; of n normal images that "
            "are too few for this, about 1 / (n + 1)."
        ),
        "Evaluation size": (
            "Maps and masks are resized before they are compared. Their shorter side is then "
            f"{f'{size} px' if size else 'that of a crop'}. Masks are resized by nearest neighbour. With encoder.fit "
            "squash, both are compared as squares."
        ),
    }
