"""Paired tests of two methods, with a reason if a test is undefined, and Holm's correction for a table of tests.

Over seeds or cases, the test is Student's t-test. Over categories, it is Wilcoxon's signed-rank test of their metrics.
Over images, it is DeLong's test of the image AUROC, averaged over categories and seeds. DeLong's test is used instead
of a bootstrap because its variance has a closed form, also for this average. It needs no random numbers, always gives
the same result, and takes only as long as sorting.
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
"""Fewest categories for a test. With five, p is at least 2 / 2^5 > 0.05, even if all differences agree."""
MIN_IMAGES = 10
"""Fewest images of each class in all categories, because DeLong's p assumes a normal distribution in the limit."""
DECIMALS = 12
"""Decimals to which differences are rounded, so that the difference of equal methods is exactly 0."""
SIGNIFICANT = 0.05
"""Corrected p-values below this are marked in tables."""
CONFIDENCE_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution, for 95 % intervals."""


@dataclass(frozen=True)
class PairedOutcome:
    """Result of a paired test of a against b. Differences are a minus b."""

    difference: float | None
    """Mean of the differences. None: without pairs."""
    p: float | None
    """Two-sided p-value. None: undefined, see `reason`."""
    n: int
    """Number of pairs: seeds, cases or categories."""
    reason: str = ""
    """Reason for an undefined p-value. Empty if p is defined."""
    t: float | None = None
    """Student's t statistic."""
    sd: float | None = None
    """Standard deviation of the differences (ddof = 1), from Student's test. None: fewer than two pairs."""
    low: float | None = None
    """Lower end of the 95 % interval of the difference, from DeLong's test."""
    high: float | None = None
    """Upper end of that interval."""
    images: int | None = None
    """Number of images of both classes in all categories, from DeLong's test."""


@dataclass(frozen=True)
class SharedImages:
    """Labelled images of one category with the scores of both systems, one row per seed. Higher is more anomalous."""

    a: Float64[np.ndarray, "S n"]
    b: Float64[np.ndarray, "R n"]
    """Scores of system b. Seeds and their number can differ from those of system a."""
    anomalous: Bool[np.ndarray, " n"]


def paired_t(a: Mapping[Key, float | None], b: Mapping[Key, float | None]) -> PairedOutcome:
    """Return the two-sided paired Student's t-test, like the thesis's table 3.2.

    Parameters
    ----------
    a, b
        Metric by seed or by case. None: undefined. Keys without a value in both are left out.

    Returns
    -------
    The test is undefined for fewer than two pairs, and if all differences are equal but not zero, because they have no
    spread. If all differences are zero, p is 1.
    """
    shared = sorted((key for key in a.keys() & b.keys() if a[key] is not None and b[key] is not None), key=str)
    if not shared:
        return PairedOutcome(None, None, 0, "no pairs")
    first, second = (np.array([one[key] for key in shared], dtype=np.float64) for one in (a, b))
    differences = np.round(first - second, DECIMALS)
    mean = float(differences.mean())
    if len(shared) == 1:
        return PairedOutcome(mean, None, 1, "only one pair")
    sd = float(differences.std(ddof=1))
    if not np.ptp(differences):
        if not differences.any():
            return PairedOutcome(0.0, 1.0, len(shared), sd=0.0)
        return PairedOutcome(mean, None, len(shared), "all differences are equal: no spread to test", sd=0.0)
    test = stats.ttest_rel(first, second)
    return PairedOutcome(mean, float(test.pvalue), len(shared), t=float(test.statistic), sd=sd)


def wilcoxon(a: Mapping[str, float], b: Mapping[str, float]) -> PairedOutcome:
    """Return Wilcoxon's two-sided signed-rank test (1945) of a metric by category.

    Categories without a difference are left out. The distribution is exact for up to 50 categories without equal
    differences. Otherwise SciPy chooses between permutations and the normal distribution.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return PairedOutcome(None, None, 0, "no category in common")
    differences = np.round([a[name] - b[name] for name in shared], DECIMALS)
    mean = float(differences.mean())
    if len(shared) < MIN_CATEGORIES:
        few = f"only {len(shared)} of the {MIN_CATEGORIES} categories that the test needs"
        return PairedOutcome(mean, None, len(shared), few)
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return PairedOutcome(mean, min(1.0, p), len(shared))


def placements(
    scores: Float64[np.ndarray, " n"], anomalous: Bool[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " k"]]:
    """Return DeLong's structural components, 0..1: V10 of each anomalous image and V01 of each normal image.

    V10 is the share of normal images that score lower. V01 is the share of anomalous images that score higher. Ties
    count half. The mean of V10 is the AUROC, and so is the mean of V01 (DeLong, DeLong and Clarke-Pearson 1988, eq. 4
    and 5).
    """

    def share_below(values: Float64[np.ndarray, " i"], others: Float64[np.ndarray, " j"]) -> Float64[np.ndarray, " i"]:
        ordered = np.sort(others)
        twice = np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")
        return twice / (2.0 * len(others))

    bad, good = scores[anomalous], scores[~anomalous]
    return share_below(bad, good), 1.0 - share_below(good, bad)


def delong(categories: Sequence[SharedImages]) -> PairedOutcome:
    """Return DeLong's test (1988) of the image AUROC of two systems, averaged over seeds and then over categories.

    Placements are averaged over each system's seeds. Their mean is the mean AUROC over seeds. Images are assumed to be
    independent, also across categories. Let D = V(a) - V(b), with k categories, and m anomalous and n normal images in
    each. The variance is then `sum_c (var(D10) / m + var(D01) / n) / k^2`. Seeds are fixed: the interval describes
    other images, not other seeds. Categories with fewer than two images of a class are left out.
    """
    used = [one for one in categories if min(np.count_nonzero(one.anomalous), np.count_nonzero(~one.anomalous)) >= 2]
    if not used:
        return PairedOutcome(None, None, 0, "no category has two images of each class", images=0)
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
        few = f"{anomalous} anomalous and {images - anomalous} normal images; the test needs {MIN_IMAGES} of each"
        return PairedOutcome(difference, None, len(used), few, images=images)
    if spread == 0.0:
        # all images agree: the difference is 0, or the images do not show its uncertainty
        same = difference == 0.0
        reason = "" if same else "all images have the same difference: no spread to test"
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
    """Return p-values after Holm's step-down correction (1979), which limits the chance of any false positive.

    None values are not counted and stay None.
    """
    rising = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, number) in enumerate(rising):
        highest = max(highest, min(1.0, (len(rising) - rank) * p))
        corrected[number] = highest
    return corrected


def p_text(value: float | None) -> str:
    """Return a p-value for a table. None: a dash."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
