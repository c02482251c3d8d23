"""Step that evaluates the scores and maps of one category against its labels and masks.

Metrics are computed per category. Reports average them over categories; pixels of different categories are not pooled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, UInt8
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medad.base.errors import InputError
from medad.base.storage import atomic_path, reading
from zsad.clip.feature_store import FeatureStore, ImageNote, ImageProblem
from zsad.config.run import EvaluationSettings
from zsad.data.images import Crops, mask_to_canvas, merge_maps, scaled_hw
from zsad.data.labelled import LabelledImage
from zsad.data.masks import check_mask, mask_note, read_mask
from zsad.evaluation import curves
from zsad.evaluation.curves import Counts, Points
from zsad.evaluation.metrics import ImageMetrics, Maps, PixelMetrics, image_metrics, pixel_curves
from zsad.scorers.stored_scores import open_scores
from zsad.steps.threshold import THRESHOLD_FILE, SavedThreshold

METRICS_FILE = "metrics.json"
CURVES_FILE = "curves.json"

M = TypeVar("M", bound=BaseModel)


@runtime_checkable
class PatchScores(Protocol):
    """Interface of a category's scores: image scores and patch maps by the images' numbers."""

    @property
    def align_corners(self) -> bool: ...
    def image_score(self, variant: str) -> Float64[np.ndarray, " n"]: ...
    def patch_map(self, i: int, variant: str) -> Float32[np.ndarray, "C g g"]: ...


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Threshold(_Record):
    """Threshold found without labels. Images with score >= value are flagged."""

    value: float
    source: Literal["quantile", "given", "normal"]
    quantile: float | None
    """Quantile of all image scores of the category; labels are not used. None: the settings give the threshold, or it
    was found from normal images."""
    flagged: int
    found: int | None
    """Number of flagged images that are anomalous. None: some images have no label."""
    false_alarms: int | None
    f1: float | None
    """F1 at this threshold. None: some images have no label, or none is anomalous, or none is normal."""


class VariantEvaluation(_Record):
    image: ImageMetrics | None
    """Metrics of image scores. None: no image has a label."""
    pixel: PixelMetrics | None
    """Metrics of maps. None: no image has a label, or the anomalous images have no masks."""
    threshold: Threshold | None
    """Deployable threshold. None: there are so few images that none would be above the quantile."""


class ImageScore(_Record):
    sha256: str
    anomalous: bool | None
    defect: str
    scores: dict[str, float]


class CategoryEvaluation(_Record):
    """Content of `metrics.json`: the metrics of one category with one seed."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal["adflows zsad evaluation 1"] = Field(default="adflows zsad evaluation 1", alias="schema")
    seed: int
    size_px: int
    """Shorter side of maps and masks when they were compared."""
    max_fpr: float
    images: tuple[ImageScore, ...]
    variants: dict[str, VariantEvaluation]
    problems: tuple[ImageProblem, ...]
    """Images that are left out of the pixel metrics. Their labels still count."""
    notes: tuple[ImageNote, ...] = ()
    """Notes on masks that are used, such as one that may be inverted."""

    @classmethod
    def load(cls, folder: Path) -> CategoryEvaluation:
        """Read `metrics.json` of a folder. Raise InputError."""
        return _load(cls, folder / METRICS_FILE)


class Curve(_Record):
    """Points of a curve to plot, both axes 0..1."""

    x: tuple[float, ...]
    y: tuple[float, ...]


class CurvePair(_Record):
    roc: Curve | None
    """False positive rate and recall. None: a class is missing."""
    pr: Curve | None
    """Recall and precision. None: nothing is anomalous."""


class CategoryCurves(_Record):
    """Content of `curves.json`: thinned curves of the last variant."""

    variant: str
    image: CurvePair | None
    pixel: CurvePair | None

    @classmethod
    def load(cls, folder: Path) -> CategoryCurves:
        """Read `curves.json` of a folder. Raise InputError."""
        return _load(cls, folder / CURVES_FILE)


@dataclass(frozen=True)
class _EvaluatedImage:
    """One image to evaluate: the number of its scores, its crops, and its mask."""

    number: int
    """Number of the image in the scores."""
    crops: Crops
    mask: UInt8[np.ndarray, " bytes"] | None
    """Mask as packed bits, at evaluation size. None: the image is left out of the pixel metrics."""
    shape_hw: tuple[int, int]
    """Evaluation size of map and mask."""


def evaluate_category(
    items: Sequence[LabelledImage],
    features: Path,
    scores: Path,
    variants: Sequence[str],
    settings: EvaluationSettings,
    out: Path,
    threshold: Path | None = None,
) -> None:
    """Evaluate one category's scores with one seed. Write `metrics.json` and `curves.json` into the existing `out`.

    Parameters
    ----------
    items
        Images of the category. Images without features (broken files) are ignored.
    features, scores
        Folders of `encode_images` and `score_category` or `score_system`.
    variants
        Names of variants in the scores; a system's only variant is `system`. All are evaluated. Curves are written for
        the last one.
    threshold
        Folder of `zsad.steps.threshold.save_threshold`, for the last variant. None: the threshold is that of the
        settings.

    Raises
    ------
    InputError
        A file of features or scores is missing or damaged, or none of the images has scores.
    """
    store, scored = FeatureStore(features), open_scores(scores)
    evaluated, category_curves = evaluate_scores(
        items,
        seed=scored.seed,
        crops={
            image.sha256: (store.crops(number), (image.height, image.width))
            for number, image in enumerate(store.images)
        },
        digests=scored.digests,
        scores=scored,
        variants=variants,
        settings=settings,
        threshold=None if threshold is None else _load(SavedThreshold, threshold / THRESHOLD_FILE).threshold,
    )
    _save(evaluated, out / METRICS_FILE)
    _save(category_curves, out / CURVES_FILE)


def evaluate_scores(
    items: Sequence[LabelledImage],
    *,
    seed: int,
    crops: Mapping[str, tuple[Crops, tuple[int, int]]],
    digests: Sequence[str],
    scores: PatchScores,
    variants: Sequence[str],
    settings: EvaluationSettings,
    threshold: float | None = None,
) -> tuple[CategoryEvaluation, CategoryCurves]:
    """Evaluate scores in memory; see `evaluate_category`.

    Parameters
    ----------
    crops
        Crops of each image, and its height and width, by digest.
    digests
        Digests of the images in the order of the scores.
    threshold
        Threshold of the last variant that was found from normal images. None: that of the settings.
    """
    numbers = {digest: number for number, digest in enumerate(digests)}
    scored_items = [item for item in items if item.sha256 in numbers and item.sha256 in crops]
    if not scored_items:
        raise InputError("images", "none of them has scores")
    images, problems, notes = _read_masks(scored_items, numbers, crops, settings)
    image_scores = {variant: scores.image_score(variant)[[image.number for image in images]] for variant in variants}
    labelled = np.array([item.anomalous is not None for item in scored_items])
    anomalous = np.array([bool(item.anomalous) for item in scored_items])
    masked = [image for image in images if image.mask is not None]
    evaluations: dict[str, VariantEvaluation] = {}
    category_curves: CategoryCurves | None = None
    for variant in variants:
        variant_scores = image_scores[variant]
        pixel = None
        if _has_masks(scored_items):
            pixel = pixel_curves(
                _maps_of(masked, scores, variant, settings), max_fpr=settings.max_fpr, pro_200=settings.pro_200
            )
        evaluations[variant] = VariantEvaluation(
            image=image_metrics(variant_scores[labelled], anomalous[labelled]) if labelled.any() else None,
            pixel=pixel.metrics if pixel else None,
            threshold=deployable_threshold(
                variant_scores,
                anomalous if labelled.all() else None,
                settings,
                threshold if variant == variants[-1] else None,
            ),
        )
        category_curves = CategoryCurves(
            variant=variant,
            image=_curves(curves.count(variant_scores[labelled], anomalous[labelled])) if labelled.any() else None,
            pixel=_curves(pixel.counts) if pixel else None,
        )
    assert category_curves is not None, "at least one variant"
    evaluated = CategoryEvaluation(
        seed=seed,
        size_px=min(images[0].shape_hw),
        max_fpr=settings.max_fpr,
        images=tuple(
            ImageScore(
                sha256=item.sha256,
                anomalous=item.anomalous,
                defect=item.defect,
                scores={variant: float(image_scores[variant][i]) for variant in variants},
            )
            for i, item in enumerate(scored_items)
        ),
        variants=evaluations,
        problems=tuple(problems),
        notes=tuple(notes),
    )
    return evaluated, category_curves


def deployable_threshold(
    scores: Float64[np.ndarray, " n"],
    anomalous: Bool[np.ndarray, " n"] | None,
    settings: EvaluationSettings,
    from_normal: float | None = None,
) -> Threshold | None:
    """Return a threshold on image scores, found without labels, and the number of images that it flags.

    Labels are used only to measure how good the threshold is. Return None for fewer than 1 / (1 - quantile) images,
    because none of them would be above the quantile. A threshold in the settings is used first, then `from_normal`.
    """
    source: Literal["quantile", "given", "normal"] = "given" if settings.threshold is not None else "normal"
    if settings.threshold is not None:
        value, quantile = settings.threshold, None
    elif from_normal is not None:
        value, quantile = from_normal, None
    else:
        quantile = settings.threshold_quantile
        if scores.size * (1 - quantile) < 1 - 1e-9:
            return None
        value, source = float(np.quantile(scores, quantile)), "quantile"
    flagged = scores >= value
    found = int(np.count_nonzero(flagged & anomalous)) if anomalous is not None else None
    f1 = None
    if anomalous is not None and found is not None and anomalous.any() and not anomalous.all():
        f1 = 2 * found / (int(np.count_nonzero(flagged)) + int(np.count_nonzero(anomalous)))
    return Threshold(
        value=value,
        source=source,
        quantile=quantile,
        flagged=int(np.count_nonzero(flagged)),
        found=found,
        false_alarms=None if found is None else int(np.count_nonzero(flagged)) - found,
        f1=f1,
    )


def _has_masks(items: Sequence[LabelledImage]) -> bool:
    """Return whether pixel metrics are possible: there are labels, and also masks if an image is anomalous."""
    anomalous = [item for item in items if item.anomalous]
    return any(item.anomalous is not None for item in items) and (
        not anomalous or any(item.mask is not None for item in anomalous)
    )


def _read_masks(
    items: Sequence[LabelledImage],
    numbers: Mapping[str, int],
    crops: Mapping[str, tuple[Crops, tuple[int, int]]],
    settings: EvaluationSettings,
) -> tuple[list[_EvaluatedImage], list[ImageProblem], list[ImageNote]]:
    """Read each mask once and pack it into bits (1/8 byte per pixel), for use by all variants and passes."""
    images: list[_EvaluatedImage] = []
    problems: list[ImageProblem] = []
    notes: list[ImageNote] = []
    for item in items:
        image_crops, image_hw = crops[item.sha256]
        shape = (
            image_crops.canvas_hw if settings.size_px is None else scaled_hw(*image_crops.canvas_hw, settings.size_px)
        )
        packed = None
        if item.anomalous is False:
            packed = np.packbits(np.zeros(shape, dtype=bool))
        elif item.anomalous and item.mask is not None:
            try:
                mask = read_mask(item.mask, image_hw, item.path)
                check_mask(mask, item.mask)
                if note := mask_note(mask, item.mask, item.path):
                    notes.append(ImageNote(sha256=item.sha256, text=note))
                packed = np.packbits(mask_to_canvas(mask, shape))
            except InputError as error:
                problems.append(ImageProblem(sha256=item.sha256, rule=error.rule))
        images.append(_EvaluatedImage(numbers[item.sha256], image_crops, packed, shape))
    return images, problems, notes


def _maps_of(
    images: Sequence[_EvaluatedImage], scores: PatchScores, variant: str, settings: EvaluationSettings
) -> Maps:
    def source() -> Iterator[tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]]:
        for image in images:
            patches = scores.patch_map(image.number, variant)
            scored = merge_maps(
                patches,
                image.crops,
                settings.size_px,
                settings.smoothing_sigma_px,
                align_corners=settings.corners_aligned(scores.align_corners),
            )
            assert image.mask is not None, "only masked images are listed"
            yield scored, np.unpackbits(image.mask, count=scored.size).view(bool).reshape(scored.shape)

    return source


def _curves(counts: Counts) -> CurvePair:
    def as_record(points: Points | None) -> Curve | None:
        return None if points is None else Curve(x=tuple(points.x.tolist()), y=tuple(points.y.tolist()))

    return CurvePair(roc=as_record(curves.roc_points(counts)), pr=as_record(curves.pr_points(counts)))


def _save(record: BaseModel, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(record.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")


def _load(model: type[M], path: Path) -> M:
    with reading(path):
        data = path.read_bytes()
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(path, f"is not a file of this step, or is damaged: {where}: {first['msg']}") from error
