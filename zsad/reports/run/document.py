"""What a report holds: the schema of `report.json`, and how it is computed from the folders of a run.

No path goes in: images appear under their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from medad.base.settings import MACHINE_FIELDS
from medad.base.text import clean
from medad.reporting.failures import ShownFailure
from medad.reporting.figures import Stat
from zsad.clip.models import MadeBy
from zsad.config.run import EvaluationSettings, Variant, ZsadSettings
from zsad.evaluation.metrics import definitions
from zsad.reports.comparable import reasons_not_comparable
from zsad.reports.published import TITLES, PublishedRow, published_rows
from zsad.steps.evaluate import CategoryCurves

SCHEMA_VERSION = 1

RANDOM_NOTICE = (
    "Random weights. The encoder was never trained: every figure and every map here is a test of the machinery and "
    "says nothing about the method or the images."
)
EMBEDDED_NOTICE = (
    "Embedded model. The encoder is the small model that comes with this program, trained on generated pictures so "
    "that the flow runs without any download. These are not results of the published method, which uses a CLIP model "
    "trained on hundreds of millions of photographs."
)

VARIANTS: dict[Variant, str] = {
    "text": "text alone: the patches and the class token against the prompts",
    "text_tta": "text with test-time adaptation",
    "visual": "reference image alone: each patch's distance to the nearest patch of another image",
    "joint": "text and reference image",
    "joint_tta": "text and reference image with test-time adaptation: the method",
}

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


PRO_200 = "pixel_pro_200"
METRICS: dict[str, str] = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1max at oracle threshold",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1max at oracle threshold",
    "pixel_aupro": "pixel AUPRO",
    "pixel_pro_200": "pixel PRO, 200 thresholds",
}
"""Key -> title, in the order of the tables. Fractions; undefined ones are None and left out of means."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Notice(_Part):
    kind: Literal["random weights", "embedded model", "published"]
    text: str


class SeedFigures(_Part):
    """One seed of one variant of one category."""

    metrics: dict[str, float | None]
    """By key of `METRICS`; a fraction."""
    image_oracle_threshold: float | None
    pixel_oracle_threshold: float | None
    deployable_threshold: float | None
    flagged: int | None
    """Images scored at the deployable threshold or above."""
    found: int | None
    """Of the anomalous ones. None without labels."""
    false_alarms: int | None
    deployable_f1: float | None


class VariantFigures(_Part):
    variant: Variant
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
    scores: dict[Variant, dict[int, float]]
    """Variant -> seed -> score of the image."""


class ShownImage(_Part):
    """An image that the HTML shows."""

    rank: Rank
    id: str
    defect: str
    anomalous: bool | None
    score: float
    flagged: bool | None
    """Whether the score reaches the deployable threshold."""
    reference: str | None
    """Id of the reference shown beside it."""
    masked: bool


class MaskProblem(_Part):
    """An image that is in no pixel figure."""

    id: str
    rule: str


class CategoryReport(_Part):
    name: str
    encoder: str
    """What its features were made with, in words."""
    images: tuple[ImageScores, ...]
    normal: int
    anomalous: int
    unlabelled: int
    masks: int
    mask_problems: tuple[MaskProblem, ...]
    prompts_per_side: int | None
    variants: tuple[VariantFigures, ...]
    shown_seed: int
    """Of pictures, histogram and curves."""
    curves: CategoryCurves
    """ROC and precision-recall of the last variant with the shown seed: at most some 400 points each."""
    shown: tuple[ShownImage, ...]


class Macro(_Part):
    """Mean over categories, then over seeds."""

    variant: Variant
    metrics: dict[str, Stat | None]
    categories: dict[str, int]
    """How many categories each mean is of."""
    deployable_f1: Stat | None


class ColourScale(_Part):
    """What the heat maps' colours mean, in all panels."""

    variant: Variant
    seed: int
    low: float
    high: float


class PublishedTable(_Part):
    benchmark: str
    comparable: bool
    """Whether nothing that is known of the run sets it apart from the published setting; a notice says what does."""
    rows: tuple[PublishedRow, ...]


class ReportDocument(_Part):
    """Everything in the report; `report.json` is this, field by field."""

    schema_version: int
    kind: str
    name: str
    notices: tuple[Notice, ...]
    notes: tuple[str, ...]
    encoders: tuple[MadeBy, ...]
    seeds: tuple[int, ...]
    macro: tuple[Macro, ...]
    """Empty when nothing is labelled."""
    published: PublishedTable | None
    colour_scale: ColourScale | None
    categories: tuple[CategoryReport, ...]
    failures: tuple[ShownFailure, ...]
    metrics: dict[str, str]
    """Key -> title of the figures shown."""
    definitions: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]


def make_document(
    settings: ZsadSettings,
    categories: Sequence[CategoryReport],
    encoders: Sequence[MadeBy],
    macro: Sequence[Macro],
    colour_scale: ColourScale | None,
    failures: Sequence[ShownFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> ReportDocument:
    """The document, of parts that are in order already."""
    distinct = tuple(dict.fromkeys(encoders))
    notices = notices_of(settings, distinct)
    published = None
    if settings.published is not None:
        scored = {one.name: len(one.images) for one in categories}
        reasons = reasons_not_comparable(settings, settings.published, scored)
        published = PublishedTable(
            benchmark=TITLES[settings.published], comparable=not reasons, rows=published_rows(settings.published)
        )
        if reasons:
            text = f"The published rows are not comparable with this run: {'; '.join(reasons)}."
            notices.append(Notice(kind="published", text=text))
    return ReportDocument(
        schema_version=SCHEMA_VERSION,
        kind="adflows zsad report",
        name=settings.name,
        notices=tuple(notices),
        notes=tuple(clean(note) for note in notes),
        encoders=distinct,
        seeds=tuple(sorted({seed for one in categories for figures in one.variants for seed in figures.seeds})),
        macro=tuple(macro),
        published=published,
        colour_scale=colour_scale,
        categories=tuple(categories),
        failures=tuple(failures),
        metrics={key: title for key, title in METRICS.items() if settings.evaluation.pro_200 or key != PRO_200},
        definitions=definitions_shown(settings.evaluation),
        settings=settings.public(*MACHINE_FIELDS),
        versions={name: clean(versions[name]) for name in sorted(versions)},
    )


def notices_of(settings: ZsadSettings, encoders: Sequence[MadeBy]) -> list[Notice]:
    """What every output must say of whose scores it shows, even where nothing came of them; empty for CLIP's."""
    notices = []
    if settings.encoder.seed is not None or any(one.random_weights for one in encoders):
        notices.append(Notice(kind="random weights", text=RANDOM_NOTICE))
    if settings.encoder.model == "embedded" or any(one.embedded for one in encoders):
        notices.append(Notice(kind="embedded model", text=EMBEDDED_NOTICE))
    return notices


def definitions_shown(evaluation: EvaluationSettings) -> dict[str, str]:
    """Term -> what a report means by it, under these settings."""
    titles = {
        "auroc": "AUROC",
        "ap": "AP",
        "f1max": "F1max at oracle threshold",
        "aupro": "AUPRO",
        "pro_200": "PRO, 200 thresholds",
        "mean": "Mean over categories",
    }
    texts = definitions(evaluation.max_fpr)
    size = evaluation.size_px
    return {titles.get(key, key): text for key, text in texts.items()} | {
        "± over seeds": (
            "Sample standard deviation (n - 1) over seeds. A seed draws each image's references and pseudo anomalies; "
            "the mean over categories is taken seed by seed."
        ),
        "Deployable threshold": (
            "A threshold on the image's score that is given, or a quantile of the category's scores; no label has a "
            "part in it. Images that reach it are flagged. A quantile of too few images is none."
        ),
        "Evaluation size": (
            f"Maps and masks are compared with the shorter side at {f'{size} px' if size else 'the size of a crop'}; "
            "masks are resized by the nearest pixel."
        ),
    }
