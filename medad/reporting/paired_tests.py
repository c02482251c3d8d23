"""Student's paired t-test with its undefined cases told, and Holm's correction over a table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

Key = TypeVar("Key", bound=int | str)
DECIMALS = 12
"""Differences are rounded to these, so that equal rows differ by nothing."""


@dataclass(frozen=True)
class PairedOutcome:
    """What the test says of a against b; differences are a minus b.

    Attributes
    ----------
    difference
        Mean of the differences; None without any pair.
    sd
        Of the differences, ddof = 1; None below two pairs.
    t, p
        Statistic and two-sided p; None where undefined, for `reason`.
    n
        Pairs.
    """

    difference: float | None
    sd: float | None
    t: float | None
    p: float | None
    n: int
    reason: str = ""


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
        return PairedOutcome(None, None, None, None, 0, "nothing to pair")
    first, second = (np.array([one[key] for key in shared], dtype=np.float64) for one in (a, b))
    differences = np.round(first - second, DECIMALS)
    mean = float(differences.mean())
    if len(shared) == 1:
        return PairedOutcome(mean, None, None, None, 1, "one pair alone")
    sd = float(differences.std(ddof=1))
    if not np.ptp(differences):
        if not differences.any():
            return PairedOutcome(0.0, 0.0, None, 1.0, len(shared))
        return PairedOutcome(mean, 0.0, None, None, len(shared), "all differences alike: no spread to test by")
    test = stats.ttest_rel(first, second)
    return PairedOutcome(mean, sd, float(test.statistic), float(test.pvalue), len(shared))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979): bounds the chance of any false finding; None takes no part and stays None."""
    rising = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, number) in enumerate(rising):
        highest = max(highest, min(1.0, (len(rising) - rank) * p))
        corrected[number] = highest
    return corrected
