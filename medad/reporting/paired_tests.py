"""Paired tests of two methods, their undefined cases told, and Holm's correction over a table of them.

Over seeds or cases: Student's t-test. Over categories: Wilcoxon's signed-rank test of their figures. Over images:
DeLong's test of the image AUROC, in its mean over categories and seeds. DeLong's and not a bootstrap: its variance is
known in closed form, also of such a mean. It draws nothing, is the same from run to run and takes as long as sorting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float64
from scipy import special, stats

Key = TypeVar("Key", bound=int | str)
MIN_CATEGORIES = 6
"""With five, even a difference that is the same way in all has p = 2 / 2^5 > 0.05."""
MIN_IMAGES = 10
"""Images of either class in all categories: DeLong's p is that of a normal distribution in the limit."""
DECIMALS = 12
"""Differences are rounded to these, so that equal methods differ by nothing."""
CONFIDENCE_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution: intervals hold 95 %."""


@dataclass(frozen=True)
class PairedOutcome:
    """What a test says of a against b. Differences are a minus b."""

    difference: float | None
    """Mean of the differences. None without any pair."""
    p: float | None
    """Two-sided p. None where it is undefined, for the reason given."""
    n: int
    """Number of pairs: of seeds, cases or categories."""
    reason: str = ""
    t: float | None = None
    """Student's statistic."""
    sd: float | None = None
    """Standard deviation of the differences, ddof = 1, by Student's test. None below two pairs."""
    low: float | None = None
    """Lower end of the difference's 95 % interval, by DeLong's test."""
    high: float | None = None
    """Upper end of that interval."""
    images: int | None = None
    """Number of images of both classes in all categories, by DeLong's test."""


@dataclass(frozen=True)
class SharedImages:
    """One category's labelled images with the scores of both systems, a row a seed; higher is more anomalous."""

    a: Float64[np.ndarray, "S n"]
    b: Float64[np.ndarray, "R n"]
    """The systems' seeds need not be the same, nor as many."""
    anomalous: Bool[np.ndarray, " n"]


def paired_t(a: Mapping[Key, float | None], b: Mapping[Key, float | None]) -> PairedOutcome:
    """Paired Student's t-test, two-sided, over what both have (the test of the thesis's table 3.2).

    Parameters
    ----------
    a, b
        Figure by seed or by case; None where it is undefined. What one of them lacks is left out.

    Returns
    -------
    Undefined below two pairs, and where all differences are alike but not zero: these then show no spread to test by.
    Without any difference p is 1.
    """
    shared = sorted((key for key in a.keys() & b.keys() if a[key] is not None and b[key] is not None), key=str)
    if not shared:
        return PairedOutcome(None, None, 0, "nothing to pair")
    first, second = (np.array([one[key] for key in shared], dtype=np.float64) for one in (a, b))
    differences = np.round(first - second, DECIMALS)
    mean = float(differences.mean())
    if len(shared) == 1:
        return PairedOutcome(mean, None, 1, "one pair alone")
    sd = float(differences.std(ddof=1))
    if not np.ptp(differences):
        if not differences.any():
            return PairedOutcome(0.0, 1.0, len(shared), sd=0.0)
        return PairedOutcome(mean, None, len(shared), "all differences alike: no spread to test by", sd=0.0)
    test = stats.ttest_rel(first, second)
    return PairedOutcome(mean, float(test.pvalue), len(shared), t=float(test.statistic), sd=sd)


def wilcoxon(a: Mapping[str, float], b: Mapping[str, float]) -> PairedOutcome:
    """Wilcoxon's signed-rank test (1945), two-sided, of figures by category; categories without a difference drop out.

    The distribution is exact for up to 50 categories without equal differences, else by permutation or by the normal
    distribution, as SciPy chooses.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return PairedOutcome(None, None, 0, "no category in common")
    differences = np.round([a[name] - b[name] for name in shared], DECIMALS)
    mean = float(differences.mean())
    if len(shared) < MIN_CATEGORIES:
        few = f"{len(shared)} of the {MIN_CATEGORIES} categories that the test needs"
        return PairedOutcome(mean, None, len(shared), few)
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return PairedOutcome(mean, min(1.0, p), len(shared))


def placements(
    scores: Float64[np.ndarray, " n"], anomalous: Bool[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " k"]]:
    """DeLong's structural components, 0..1: V10 of each anomalous and V01 of each normal image, in their order.

    V10 is the share of normal images that score lower, V01 the share of anomalous ones that score higher, ties counting
    half; the mean of either is the AUROC (DeLong, DeLong and Clarke-Pearson 1988, eq. 4 and 5).
    """

    def share_below(values: Float64[np.ndarray, " i"], others: Float64[np.ndarray, " j"]) -> Float64[np.ndarray, " i"]:
        ordered = np.sort(others)
        twice = np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")
        return twice / (2.0 * len(others))

    bad, good = scores[anomalous], scores[~anomalous]
    return share_below(bad, good), 1.0 - share_below(good, bad)


def delong(categories: Sequence[SharedImages]) -> PairedOutcome:
    """DeLong's test (1988) of two systems' image AUROC, as its mean over seeds and then over categories.

    Placements are averaged over each system's seeds: the mean over seeds of an AUROC is the mean of its averaged
    placements. Images are independent, those of several categories too, so that with D = V(a) - V(b), k categories,
    and m anomalous and n normal images in each, the variance is `sum_c (var(D10) / m + var(D01) / n) / k^2`. Seeds are
    taken as given: the interval says what other images would do, not other seeds. Categories with fewer than two images
    of either class are passed over.
    """
    used = [one for one in categories if min(np.count_nonzero(one.anomalous), np.count_nonzero(~one.anomalous)) >= 2]
    if not used:
        return PairedOutcome(None, None, 0, "no category has two images of either class", images=0)
    difference = variance = 0.0
    for one in used:
        (a10, a01), (b10, b01) = _mean_placements(one.a, one.anomalous), _mean_placements(one.b, one.anomalous)
        v10, v01 = np.round(a10 - b10, DECIMALS), np.round(a01 - b01, DECIMALS)
        difference += float(v10.mean()) / len(used)
        variance += float(v10.var(ddof=1) / v10.size + v01.var(ddof=1) / v01.size) / len(used) ** 2
    difference, spread = round(difference, DECIMALS), float(np.sqrt(variance))
    anomalous = sum(int(np.count_nonzero(one.anomalous)) for one in used)
    images = sum(one.anomalous.size for one in used)
    if min(anomalous, images - anomalous) < MIN_IMAGES:
        few = f"{anomalous} anomalous and {images - anomalous} normal images; the test needs {MIN_IMAGES} of either"
        return PairedOutcome(difference, None, len(used), few, images=images)
    if spread == 0.0:
        # every image says the same: no difference at all, or one whose uncertainty these images do not show
        same = difference == 0.0
        reason = "" if same else "every image differs alike, so there is no spread to test by"
        return PairedOutcome(difference, 1.0 if same else None, len(used), reason, images=images)
    margin = CONFIDENCE_Z * spread
    p = float(special.erfc(abs(difference) / spread / np.sqrt(2.0)))
    low, high = difference - margin, difference + margin
    return PairedOutcome(difference, p, len(used), low=low, high=high, images=images)


def _mean_placements(
    scores: Float64[np.ndarray, "S n"], anomalous: Bool[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " k"]]:
    each = [placements(row, anomalous) for row in scores]
    return np.mean([v10 for v10, _ in each], axis=0), np.mean([v01 for _, v01 in each], axis=0)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979): bounds the chance of any false finding; None takes no part and stays None."""
    rising = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, number) in enumerate(rising):
        highest = max(highest, min(1.0, (len(rising) - rank) * p))
        corrected[number] = highest
    return corrected
