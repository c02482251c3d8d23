"""Exact ROC, precision-recall and PRO curves from sorted scores, including ties.

Between two scores of positives, only the number of false positives changes. So the counts at and above each *distinct
score of a positive* determine the curves. Only the scores of positives are stored; negatives are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

MAX_POINTS = 400
"""Largest number of points of a plotted curve. Metrics are computed from all points."""


@dataclass(frozen=True)
class Counts:
    """Counts at and above each distinct score of a positive, from the highest score down."""

    thresholds: Float[np.ndarray, " k"]
    """Distinct scores t of positives, falling."""
    true_positives: Int64[np.ndarray, " k"]
    """Number of positives with score >= t. The last value counts all positives."""
    false_positives: Int64[np.ndarray, " k"]
    """Number of negatives with score >= t."""
    false_positives_above: Int64[np.ndarray, " k"]
    """Number of negatives with score > t. It differs from `false_positives` if positives and negatives tie."""
    negatives: int

    @property
    def positives(self) -> int:
        return int(self.true_positives[-1]) if self.true_positives.size else 0


@dataclass(frozen=True)
class Points:
    """Points of a curve to plot, in order; both axes are 0..1."""

    x: Float64[np.ndarray, " n"]
    y: Float64[np.ndarray, " n"]


def count(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Counts:
    """Return the counts of scores in memory. Raise ValueError for a score that is NaN or infinite."""
    if not np.isfinite(scores).all():
        raise ValueError("a score is NaN or infinite")
    thresholds, counts_at = np.unique(scores[positive], return_counts=True)
    negatives = np.sort(scores[~positive])
    thresholds, counts_at = thresholds[::-1].copy(), counts_at[::-1]
    return Counts(
        thresholds,
        np.cumsum(counts_at, dtype=np.int64),
        negatives.size - np.searchsorted(negatives, thresholds, side="left").astype(np.int64),
        negatives.size - np.searchsorted(negatives, thresholds, side="right").astype(np.int64),
        int(negatives.size),
    )


def auroc(counts: Counts) -> float | None:
    """Return P(a positive scores higher than a negative) + half P(they tie), 0..1. None: a class is missing."""
    pairs = counts.positives * counts.negatives
    if not pairs:
        return None
    counts_at = np.diff(counts.true_positives, prepend=0)
    # twice the number of negatives below, plus ties once; the products are exact as floats up to 2**53
    below = 2 * counts.negatives - counts.false_positives - counts.false_positives_above
    return min(1.0, float(np.sum(counts_at * below.astype(np.float64))) / (2.0 * pairs))


def average_precision(counts: Counts) -> float | None:
    """Return the sum of precision times the rise of recall (not the trapezoid), 0..1. None: no positives."""
    if not counts.positives:
        return None
    precision = counts.true_positives / (counts.true_positives + counts.false_positives)
    counts_at = np.diff(counts.true_positives, prepend=0)
    return min(1.0, float(np.sum(counts_at * precision)) / counts.positives)


def f1_max(counts: Counts) -> tuple[float, float] | None:
    """Return the largest F1 = 2 TP / (2 TP + FP + FN) over all thresholds, and its threshold t (positive: score >= t).

    If several thresholds give the same F1, the highest is returned. It is an oracle threshold: the labels select it.
    None: no positives. With at least one positive, no denominator is 0.
    """
    if not counts.positives:
        return None
    f1 = 2 * counts.true_positives / (counts.true_positives + counts.false_positives + counts.positives)
    best = int(np.argmax(f1))
    return float(f1[best]), float(counts.thresholds[best])


def aupro(counts: Counts, overlap: Float64[np.ndarray, " k"], max_fpr: float) -> float | None:
    """Return the area under per-region overlap against false positive rate up to `max_fpr`, divided by `max_fpr`.

    Parameters
    ----------
    counts
        Counts of all pixels.
    overlap
        Share of each region's pixels at or above each threshold, mean over regions, 0..1 (MVTec AD's definition).
    max_fpr
        End of the integral, 0 < max_fpr <= 1. The curve starts at (0, 0) and is interpolated at the end.

    Returns
    -------
    A value in 0..1. None: no region or no negative pixel.
    """
    if not counts.positives or not counts.negatives:
        return None
    # thresholds up to the first with a rate above max_fpr, or all
    needed = min(overlap.size, 1 + int(np.searchsorted(counts.false_positives, max_fpr * counts.negatives, "right")))
    # two points per threshold: just above it (with the overlap so far) and at it; ties make the line between them slant
    fpr = np.empty(2 * needed + 2)
    pro = np.empty_like(fpr)
    fpr[0] = pro[0] = 0.0
    fpr[1:-1:2] = counts.false_positives_above[:needed] / counts.negatives
    fpr[2:-1:2] = counts.false_positives[:needed] / counts.negatives
    pro[1:-1:2] = np.concatenate([[0.0], overlap[: needed - 1]])
    pro[2:-1:2] = overlap[:needed]
    fpr[-1] = pro[-1] = 1.0
    inside = int(np.searchsorted(fpr, max_fpr, side="right"))
    x, y = fpr[:inside], pro[:inside]
    if inside < fpr.size:
        # the first point beyond max_fpr has a larger rate than the last point inside, so the slope is finite
        slope = (pro[inside] - y[-1]) / (fpr[inside] - x[-1])
        x, y = np.append(x, max_fpr), np.append(y, y[-1] + slope * (max_fpr - x[-1]))
    return min(1.0, float(np.trapezoid(y, x)) / max_fpr)


def roc_points(counts: Counts, max_points: int = MAX_POINTS) -> Points | None:
    """Return the ROC curve: false positive rate and recall, from (0, 0) to (1, 1). None: a class is missing."""
    if not counts.positives or not counts.negatives:
        return None
    recall = np.concatenate([[0], counts.true_positives]) / counts.positives
    x = np.stack([counts.false_positives_above, counts.false_positives], axis=1).ravel() / counts.negatives
    y = np.stack([recall[:-1], recall[1:]], axis=1).ravel()
    return _thin(np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]]), max_points)


def pr_points(counts: Counts, max_points: int = MAX_POINTS) -> Points | None:
    """Return recall and precision at the distinct scores of positives, with rising recall. None: no positives."""
    if not counts.positives:
        return None
    precision = counts.true_positives / (counts.true_positives + counts.false_positives)
    return _thin(counts.true_positives / counts.positives, precision, max_points)


def _thin(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"], max_points: int) -> Points:
    """Select points evenly spaced along the curve, including both ends."""
    if x.size > max_points:
        along = np.cumsum(np.abs(np.diff(x, prepend=x[0])) + np.abs(np.diff(y, prepend=y[0])))
        chosen = np.searchsorted(along, np.linspace(0.0, along[-1], max_points))
        chosen = np.unique(np.concatenate([[0], np.minimum(chosen, x.size - 1), [x.size - 1]]))
        x, y = x[chosen], y[chosen]
    return Points(x, y)
