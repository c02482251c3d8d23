"""Metrics of a prediction against the ground truth.

`evaluate` computes them for one case, `summarise` over all cases. `definitions` explains each metric for the report.
Ties are counted exactly, and every metric has a rule for empty masks.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medad.base.boxes import bounding_box
from medad.base.errors import InputError
from medad.config.liver import EvaluationSettings
from medad.evaluation.postprocess import label_components

METRICS_FILE = "metrics.json"
SCORES_FILE = "scores.safetensors"

HISTOGRAM_BINS = 65_536
LOGIT_LIMIT = 20.0
"""Histograms span logits -20..20 (probabilities 2e-9 .. 1 - 2e-9). Values outside go into the outermost bin."""

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CaseMetrics(_Record):
    """Metrics of one case. Higher is better unless stated otherwise."""

    case_id: str
    dice_3d: Unit
    """Dice on the scan's own grid. Both masks empty: 1. Exactly one empty: 0."""
    true_mm3: Annotated[float, Field(ge=0)]
    predicted_mm3: Annotated[float, Field(ge=0)]
    slice_tp_px: Count
    """Pixels of the slice grid that are tumour in truth and prediction."""
    slice_fp_px: Count
    slice_fn_px: Count
    slice_scores: tuple[Unit, ...]
    """Largest probability inside the liver, for each slice."""
    slice_truth: tuple[bool, ...]
    """True for each slice that contains a tumour pixel."""
    voxel_auroc: Unit | None
    """AUROC of liver voxels on the scan's grid. None: the liver contains no tumour, or only tumour."""
    true_lesions: Count
    found_lesions: Count
    predicted_lesions: Count
    false_positives: Count
    """Predicted lesions that share no voxel with a true lesion. Lower is better."""

    @model_validator(mode="after")
    def _counts_agree(self) -> CaseMetrics:
        if len(self.slice_scores) != len(self.slice_truth):
            raise ValueError("slice_scores and slice_truth must have equal length")
        if self.found_lesions > self.true_lesions or self.false_positives > self.predicted_lesions:
            raise ValueError("more lesions found, or more false positives, than lesions")
        return self

    @property
    def micro_dice_2d(self) -> float | None:
        """Dice over all pixels of this case's slices. None: both masks are empty."""
        return dice_of_counts(self.slice_tp_px, self.slice_fp_px, self.slice_fn_px)

    @property
    def slice_auroc(self) -> float | None:
        """AUROC over this case's slices. None: all slices contain tumour, or none does."""
        return auroc(np.array(self.slice_scores), np.array(self.slice_truth, dtype=bool))


@dataclass(frozen=True)
class LogitHistogram:
    """Counts of tumour and healthy voxels in equal bins of the logit.

    Histograms make it possible to pool the AUROC over cases without storing their voxels. The 65,536 bins span logits
    -20..20, so a bin is 0.0006 wide. Voxels in one bin count as ties. The pooled AUROC therefore differs from the exact
    one by at most `resolution()`.
    """

    tumour: Int64[np.ndarray, " bins"]
    healthy: Int64[np.ndarray, " bins"]

    @classmethod
    def empty(cls) -> LogitHistogram:
        return cls(np.zeros(HISTOGRAM_BINS, dtype=np.int64), np.zeros(HISTOGRAM_BINS, dtype=np.int64))

    @classmethod
    def from_probabilities(
        cls, probability: Float[np.ndarray, " voxels"], truth: Bool[np.ndarray, " voxels"]
    ) -> LogitHistogram:
        """Return the histogram of probabilities in 0..1. Raises ValueError for other values."""
        return cls(_histogram(probability[truth]), _histogram(probability[~truth]))

    def __add__(self, other: LogitHistogram) -> LogitHistogram:
        return LogitHistogram(self.tumour + other.tumour, self.healthy + other.healthy)

    def auroc(self) -> float | None:
        """Return P(tumour voxel in a higher bin than a healthy one) + P(same bin) / 2. None: one class is absent."""
        pairs = int(self.tumour.sum()) * int(self.healthy.sum())
        if not pairs:
            return None
        # Python integers: twice the number of pairs of 130 scans (1e9 x 1e8) is close to the limit of 64 bits
        below = np.cumsum(self.healthy) - self.healthy
        filled = np.flatnonzero(self.tumour)
        twice = sum(int(self.tumour[b]) * (2 * int(below[b]) + int(self.healthy[b])) for b in filled)
        return twice / (2 * pairs)

    def resolution(self) -> float | None:
        """Return the largest possible error of `auroc()`: half the share of pairs in one bin. None if undefined."""
        pairs = int(self.tumour.sum()) * int(self.healthy.sum())
        if not pairs:
            return None
        shared = np.flatnonzero((self.tumour > 0) & (self.healthy > 0))
        return sum(int(self.tumour[b]) * int(self.healthy[b]) for b in shared) / (2 * pairs)


@dataclass(frozen=True)
class CaseEvaluation:
    """Metrics and score histogram of a case, stored as `metrics.json` and `scores.safetensors` in one folder."""

    metrics: CaseMetrics
    histogram: LogitHistogram

    def save(self, folder: Path) -> None:
        """Write both files into an existing folder. Equal evaluations give equal bytes."""
        (folder / METRICS_FILE).write_text(self.metrics.model_dump_json(indent=1) + "\n", encoding="utf-8")
        filled = np.flatnonzero(self.histogram.tumour + self.histogram.healthy)
        bins = {
            "bin": filled.astype(np.int32),
            "tumour": self.histogram.tumour[filled],
            "healthy": self.histogram.healthy[filled],
        }
        save_file(bins, folder / SCORES_FILE)

    @classmethod
    def load(cls, folder: Path) -> CaseEvaluation:
        """Read both files. Raises InputError that names the missing or damaged file."""
        path = folder / METRICS_FILE
        try:
            metrics = CaseMetrics.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(path, f"cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(path, f"not the metrics of a case: {first['loc']}: {first['msg']}") from error
        path = folder / SCORES_FILE
        try:
            bins = load_file(path)
            histogram = LogitHistogram.empty()
            histogram.tumour[bins["bin"]] = bins["tumour"]
            histogram.healthy[bins["bin"]] = bins["healthy"]
        except OSError as error:
            raise InputError(path, f"cannot be read ({error.strerror})") from error
        except (SafetensorError, KeyError, IndexError, ValueError) as error:
            raise InputError(path, f"not a score histogram: {error}") from error
        return cls(metrics, histogram)


class Summary(_Record):
    """Metrics over all evaluated cases. Every mean is over cases unless its name says pooled or micro."""

    cases: Count
    slices: Count
    micro_dice_2d: Unit | None
    dice_3d_mean: Unit | None
    dice_3d_sd: Annotated[float, Field(ge=0)] | None
    """Sample standard deviation (ddof = 1). None: fewer than two cases."""
    slice_auroc: Unit | None
    voxel_auroc_mean: Unit | None
    voxel_auroc_cases: Count
    """Number of cases with a voxel AUROC; the mean is over these."""
    voxel_auroc_pooled: Unit | None
    voxel_auroc_pooled_resolution: Annotated[float, Field(ge=0, le=0.5)] | None
    lesion_sensitivity: Unit | None
    true_lesions: Count
    found_lesions: Count
    predicted_lesions: Count
    false_positives: Count
    false_positives_per_case: Annotated[float, Field(ge=0)] | None


def dice_of_counts(tp: int, fp: int, fn: int) -> float | None:
    """Return 2 TP / (2 TP + FP + FN), in 0..1. None: all three are 0."""
    total = 2 * tp + fp + fn
    return 2 * tp / total if total else None


def dice(first: Bool[np.ndarray, "*shape"], second: Bool[np.ndarray, "*shape"]) -> float:
    """Return the Dice of two masks of equal shape, in 0..1. Both empty: 1. Exactly one empty: 0."""
    tp, fp, fn = _confusion(first, second)
    value = dice_of_counts(tp, fp, fn)
    return 1.0 if value is None else value


def auroc(scores: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float | None:
    """Return the exact area under the ROC curve: P(positive scores higher than negative) + P(tie) / 2.

    Parameters
    ----------
    scores
        Finite or infinite values. Higher means more likely positive.
    truth
        True for positives.

    Returns
    -------
    Value in 0..1. None: one class is absent. Raises ValueError if a score is NaN.
    """
    if scores.shape != truth.shape:
        raise ValueError(f"scores have shape {scores.shape}, truth {truth.shape}")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    positives, negatives = np.sort(scores[truth]), np.sort(scores[~truth])
    if not positives.size or not negatives.size:
        return None
    below = int(np.searchsorted(negatives, positives, side="left").sum(dtype=np.int64))
    not_above = int(np.searchsorted(negatives, positives, side="right").sum(dtype=np.int64))
    return (below + not_above) / (2 * positives.size * negatives.size)


def evaluate(
    case_id: str,
    *,
    truth: Bool[np.ndarray, "X Y Z"],
    prediction: Bool[np.ndarray, "X Y Z"],
    probability: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    voxel_mm3: float,
    slice_truth: Bool[np.ndarray, "N S S"],
    slice_prediction: Bool[np.ndarray, "N S S"],
    slice_probability: Float32[np.ndarray, "N S S"],
    slice_organ: Bool[np.ndarray, "N S S"],
    settings: EvaluationSettings,
) -> CaseEvaluation:
    """Compute the metrics of one case, on the scan's grid and on the slice grid.

    Parameters
    ----------
    truth, prediction, probability, liver
        Arrays on the scan's grid. `prediction` is the post-processed mask, `probability` is P(tumour) in 0..1.
    voxel_mm3
        Volume of one voxel of that grid.
    slice_truth, slice_prediction, slice_probability, slice_organ
        The same on the slice grid, which contains only slices with liver.

    Raises ValueError if a probability inside the liver is NaN or outside 0..1.
    """
    tp, fp, fn = _confusion(slice_prediction, slice_truth)
    in_liver = truth[liver]
    scores = probability[liver]
    true_lesions, found = _lesions_found(truth, prediction, settings.lesion_overlap)
    predicted_lesions, hits = _lesions_found(prediction, truth, 0.0)
    slice_scores = slice_probability.max(axis=(1, 2), where=slice_organ, initial=0.0)
    metrics = CaseMetrics(
        case_id=case_id,
        dice_3d=dice(prediction, truth),
        true_mm3=np.count_nonzero(truth) * voxel_mm3,
        predicted_mm3=np.count_nonzero(prediction) * voxel_mm3,
        slice_tp_px=tp,
        slice_fp_px=fp,
        slice_fn_px=fn,
        slice_scores=tuple(slice_scores.tolist()),
        slice_truth=tuple(bool(plane.any()) for plane in slice_truth),
        voxel_auroc=auroc(scores, in_liver),
        true_lesions=true_lesions,
        found_lesions=found,
        predicted_lesions=predicted_lesions,
        false_positives=predicted_lesions - hits,
    )
    return CaseEvaluation(metrics, LogitHistogram.from_probabilities(scores, in_liver))


def summarise(cases: Sequence[CaseEvaluation]) -> Summary:
    """Return the metrics over all cases. The order of the cases does not change any bit of the result."""
    metrics = [case.metrics for case in cases]
    dices = [case.dice_3d for case in metrics]
    voxel_aurocs = [case.voxel_auroc for case in metrics if case.voxel_auroc is not None]
    pooled = sum((case.histogram for case in cases), LogitHistogram.empty())
    slice_scores = np.array([score for case in metrics for score in case.slice_scores], dtype=np.float64)
    slice_truth = np.array([holds_tumour for case in metrics for holds_tumour in case.slice_truth], dtype=bool)
    true_lesions = sum(case.true_lesions for case in metrics)
    found = sum(case.found_lesions for case in metrics)
    false_positives = sum(case.false_positives for case in metrics)
    return Summary(
        cases=len(metrics),
        slices=len(slice_scores),
        micro_dice_2d=dice_of_counts(
            sum(case.slice_tp_px for case in metrics),
            sum(case.slice_fp_px for case in metrics),
            sum(case.slice_fn_px for case in metrics),
        ),
        # fmean and stdev sum exactly, so the order of cases does not matter
        dice_3d_mean=statistics.fmean(dices) if dices else None,
        dice_3d_sd=statistics.stdev(dices) if len(dices) > 1 else None,
        slice_auroc=auroc(slice_scores, slice_truth),
        voxel_auroc_mean=statistics.fmean(voxel_aurocs) if voxel_aurocs else None,
        voxel_auroc_cases=len(voxel_aurocs),
        voxel_auroc_pooled=pooled.auroc(),
        voxel_auroc_pooled_resolution=pooled.resolution(),
        lesion_sensitivity=found / true_lesions if true_lesions else None,
        true_lesions=true_lesions,
        found_lesions=found,
        predicted_lesions=sum(case.predicted_lesions for case in metrics),
        false_positives=false_positives,
        false_positives_per_case=false_positives / len(metrics) if metrics else None,
    )


def _confusion(prediction: Bool[np.ndarray, "*shape"], truth: Bool[np.ndarray, "*shape"]) -> tuple[int, int, int]:
    """Return true positives, false positives and false negatives."""
    if prediction.shape != truth.shape:
        raise ValueError(f"masks have shapes {prediction.shape} and {truth.shape}")
    tp = int(np.count_nonzero(prediction & truth))
    return tp, int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(truth)) - tp


def _lesions_found(
    lesions: Bool[np.ndarray, "X Y Z"], other: Bool[np.ndarray, "X Y Z"], overlap: float
) -> tuple[int, int]:
    """Return the number of lesions, and how many have a voxel and the share `overlap` of their voxels in `other`."""
    box = bounding_box(lesions)
    if box is None:
        return 0, 0
    inside = lesions[box]
    labels, count = label_components(inside)
    sizes = np.bincount(labels[inside], minlength=count + 1)[1:]
    covered = np.bincount(labels[inside & other[box]], minlength=count + 1)[1:]
    # tolerance: 3 of 10 voxels are 30 %, even if 0.3 * 10 is rounded up
    found = (covered > 0) & (covered >= sizes * overlap * (1 - 1e-12))
    return count, int(np.count_nonzero(found))


def _histogram(probability: Float[np.ndarray, " voxels"]) -> Int64[np.ndarray, " bins"]:
    counts = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    # a million voxels at a time, to limit memory: the logits are in double precision
    for start in range(0, probability.size, 1_000_000):
        p = probability[start : start + 1_000_000].astype(np.float64)
        if not ((p >= 0) & (p <= 1)).all():
            raise ValueError("a probability is NaN or outside 0..1")
        with np.errstate(divide="ignore"):
            logit = np.log(p) - np.log1p(-p)
        place = (np.clip(logit, -LOGIT_LIMIT, LOGIT_LIMIT) + LOGIT_LIMIT) * (HISTOGRAM_BINS / (2 * LOGIT_LIMIT))
        counts += np.bincount(np.minimum(place.astype(np.int64), HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
    return counts
