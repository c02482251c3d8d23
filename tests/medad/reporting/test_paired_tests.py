"""Paired tests against enumeration, explicit formulas, and laws of p-values."""

from __future__ import annotations

from itertools import product
from math import erfc, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from medad.reporting.paired_tests import (
    MIN_CATEGORIES,
    MIN_IMAGES,
    SharedImages,
    delong,
    holm,
    paired_t,
    placements,
    wilcoxon,
)


def shared(a: Any, b: Any, anomalous: list[bool]) -> SharedImages:
    return SharedImages(
        np.atleast_2d(np.asarray(a, dtype=np.float64)),
        np.atleast_2d(np.asarray(b, dtype=np.float64)),
        np.array(anomalous, dtype=bool),
    )


def drawn(
    rng: np.random.Generator, normal: int, anomalous: int, shift_a: float, shift_b: float, seeds: int = 1
) -> SharedImages:
    """Draw correlated normal scores of two systems. A system's shift is added to anomalous images."""
    labels = np.arange(normal + anomalous) >= normal
    common = rng.normal(size=labels.size)
    a, b = (common + rng.normal(size=(seeds, labels.size)) + labels * shift for shift in (shift_a, shift_b))
    return shared(a, b, labels.tolist())


# ---------------------------------------------------------------- Student


def test_it_is_students_formula() -> None:
    a, b = {0: 0.5, 1: 0.7, 2: 0.6, 3: 0.4}, {0: 0.4, 1: 0.5, 2: 0.65, 3: 0.1}
    differences = [a[key] - b[key] for key in a]
    mean = sum(differences) / 4
    sd = sqrt(sum((d - mean) ** 2 for d in differences) / 3)
    t = mean / (sd / 2)
    p = special.betainc(1.5, 0.5, 3 / (3 + t * t))  # two-sided tail of Student's t with 3 degrees of freedom
    found = paired_t(a, b)
    assert found.n == 4
    assert found.difference == pytest.approx(mean)
    assert found.sd == pytest.approx(sd)
    assert found.t == pytest.approx(t)
    assert found.p == pytest.approx(float(p))
    other = paired_t(b, a)
    assert other.t == pytest.approx(-t)
    assert other.p == pytest.approx(float(p))


def test_only_what_both_have_is_paired() -> None:
    whole = paired_t({0: 0.1, 1: 0.4, 2: 0.2}, {0: 0.0, 1: 0.1, 2: 0.3})
    assert paired_t({0: 0.1, 1: 0.4, 2: 0.2, 9: 1.0, 5: 0.7}, {2: 0.3, 1: 0.1, 0: 0.0, 5: None, 8: 0.5}) == whole


def test_undefined_cases_have_a_reason() -> None:
    none = paired_t({0: 0.1}, {1: 0.1})
    assert (none.difference, none.p, none.n) == (None, None, 0)
    one = paired_t({0: 0.5}, {0: 0.2})
    assert one.difference == pytest.approx(0.3)
    assert (one.sd, one.p, one.n) == (None, None, 1)
    alike = paired_t({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5})
    assert (alike.p, alike.t) == (None, None)
    assert "no spread" in alike.reason
    assert all(found.reason for found in (none, one, alike))
    same = paired_t({0: 0.5, 1: 0.1}, {0: 0.5, 1: 0.1})
    assert (same.p, same.difference, same.reason) == (1.0, 0.0, "")


# ---------------------------------------------------------------- DeLong


def psi(anomalous: float, normal: float) -> float:
    return 1.0 if anomalous > normal else 0.5 if anomalous == normal else 0.0


def auroc_by_pairs(scores: Any, labels: list[bool]) -> float:
    bad = [s for s, label in zip(scores, labels, strict=True) if label]
    good = [s for s, label in zip(scores, labels, strict=True) if not label]
    return sum(psi(x, y) for x in bad for y in good) / (len(bad) * len(good))


def delong_written_out(a: Any, b: Any, labels: list[bool]) -> tuple[float, float]:
    """Return difference and two-sided p of one category and seed, from the paper's covariance matrices S10 and S01."""
    bad = [i for i, label in enumerate(labels) if label]
    good = [i for i, label in enumerate(labels) if not label]
    m, n = len(bad), len(good)
    theta = [auroc_by_pairs(scores, labels) for scores in (a, b)]
    v10 = [[sum(psi(s[i], s[j]) for j in good) / n for i in bad] for s in (a, b)]
    v01 = [[sum(psi(s[i], s[j]) for i in bad) / m for j in good] for s in (a, b)]
    covariance = [[0.0, 0.0], [0.0, 0.0]]
    for r in range(2):
        for s in range(2):
            s10 = sum((v10[r][i] - theta[r]) * (v10[s][i] - theta[s]) for i in range(m)) / (m - 1)
            s01 = sum((v01[r][j] - theta[r]) * (v01[s][j] - theta[s]) for j in range(n)) / (n - 1)
            covariance[r][s] = s10 / m + s01 / n
    variance = covariance[0][0] - 2 * covariance[0][1] + covariance[1][1]
    return theta[0] - theta[1], erfc(abs(theta[0] - theta[1]) / sqrt(variance) / sqrt(2))


@pytest.mark.parametrize("seed", range(4))
def test_delong_is_the_papers_formula(seed: int) -> None:
    one = drawn(np.random.default_rng(seed), 13, 11, 1.0, 0.3)
    # coarse scores have ties
    a, b = np.round(one.a), np.round(one.b)
    labels = one.anomalous.tolist()
    difference, p = delong_written_out(a[0], b[0], labels)
    outcome = delong([shared(a, b, labels)])
    assert outcome.difference == pytest.approx(difference, abs=1e-9)
    assert outcome.p == pytest.approx(p, abs=1e-9)
    assert (outcome.n, outcome.images) == (1, 24)


def test_placements_average_to_the_auroc() -> None:
    scores, labels = np.array([0.1, 0.4, 0.4, 0.2, 0.4, 0.9]), [False, False, False, True, True, True]
    v10, v01 = placements(scores, np.array(labels))
    # by hand: 0.2 beats one of three; 0.4 beats one and ties with two; 0.9 beats all
    np.testing.assert_allclose(v10, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(v01, [1, 1.5 / 3, 1.5 / 3])
    assert v10.mean() == pytest.approx(v01.mean()) == pytest.approx(auroc_by_pairs(scores, labels))


def test_difference_is_that_of_means_over_seeds_and_then_categories() -> None:
    rng = np.random.default_rng(0)
    categories = [drawn(rng, 12, 15, 1.0, 0.5, seeds=3), drawn(rng, 40, 10, 2.0, 0.5, seeds=3)]
    expected = 0.0
    for one in categories:
        labels = one.anomalous.tolist()
        ours = sum(auroc_by_pairs(row, labels) for row in one.a) / 3
        theirs = sum(auroc_by_pairs(row, labels) for row in one.b) / 3
        expected += (ours - theirs) / 2
    outcome = delong(categories)
    assert outcome.difference == pytest.approx(expected, abs=1e-9)
    assert outcome.low is not None
    assert outcome.high is not None
    assert outcome.low < expected < outcome.high
    assert (outcome.low + outcome.high) / 2 == pytest.approx(expected, abs=1e-9)


def test_variance_of_a_mean_over_categories_is_that_of_independent_ones() -> None:
    """The same category twice gives the same difference and half the variance."""
    one = drawn(np.random.default_rng(1), 20, 20, 1.0, 0.5)
    once, twice = delong([one]), delong([one, one])
    assert once.low is not None
    assert twice.low is not None
    assert once.difference == twice.difference
    assert once.difference is not None
    assert (once.difference - once.low) / sqrt(2) == pytest.approx(once.difference - twice.low, rel=1e-9)


def test_equal_systems_differ_by_nothing_whatever_their_scale() -> None:
    one = drawn(np.random.default_rng(2), 20, 20, 1.0, 1.0, seeds=3)
    outcome = delong([shared(one.a, np.exp(3 * one.a), one.anomalous.tolist())])
    assert (outcome.difference, outcome.p) == (0.0, 1.0)
    # seeds in another order are the same system, but sums are rounded differently
    assert delong([shared(one.a, one.a[[2, 0, 1]], one.anomalous.tolist())]).p == 1.0
    # a system that does not depend on the seed has one row
    assert delong([shared(one.a[:1], one.a[[0, 0]], one.anomalous.tolist())]).p == 1.0


def test_large_difference_is_found_and_swapping_systems_turns_it_round() -> None:
    one = drawn(np.random.default_rng(3), 60, 60, 2.5, 0.0)
    there, back = delong([one]), delong([SharedImages(one.b, one.a, one.anomalous)])
    assert there.p is not None
    assert there.p < 1e-6
    assert there.difference is not None
    assert there.difference > 0.2
    assert back.p == there.p
    assert back.difference == -there.difference
    assert (back.low, back.high) == (-(there.high or 0), -(there.low or 0))


def test_p_is_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(4)
    ps = [delong([drawn(rng, 40, 40, 1.0, 1.0), drawn(rng, 30, 50, 0.5, 0.5)]).p for _ in range(400)]
    # p of the Kolmogorov-Smirnov test; with a wrong variance it is about 0
    assert stats.kstest([p for p in ps if p is not None], "uniform").pvalue > 0.01


def test_too_few_images_are_said_to_be() -> None:
    rng = np.random.default_rng(5)
    few = delong([drawn(rng, MIN_IMAGES, MIN_IMAGES - 1, 2.0, 0.0)])
    assert few.p is None
    assert "9 anomalous and 10 normal" in few.reason
    assert few.difference is not None
    # together there are enough
    assert delong([drawn(rng, 6, 6, 2.0, 0.0), drawn(rng, 6, 6, 2.0, 0.0)]).p is not None
    alone = delong([shared([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [False, False, True])])
    assert (alone.p, alone.difference, alone.n) == (None, None, 0)
    assert alone.reason


def test_a_difference_without_spread_has_no_p() -> None:
    labels = [False] * 10 + [True] * 10
    right, wrong = [0.0] * 10 + [1.0] * 10, [1.0] * 10 + [0.0] * 10
    outcome = delong([shared(right, wrong, labels)])
    assert (outcome.difference, outcome.p) == (1.0, None)
    assert "no spread" in outcome.reason


# ---------------------------------------------------------------- Wilcoxon


def named(values: list[float]) -> dict[str, float]:
    return {f"c{i}": value for i, value in enumerate(values)}


def by_enumeration(differences: list[float]) -> float:
    """Return the two-sided p over all 2^n signs of the mid-ranks of non-zero differences."""
    kept = [d for d in differences if d]
    ranks = [sum(abs(o) < abs(d) for o in kept) + (sum(abs(o) == abs(d) for o in kept) + 1) / 2 for d in kept]
    middle = sum(ranks) / 2
    seen = abs(sum(r for r, d in zip(ranks, kept, strict=True) if d > 0) - middle)
    extreme = [
        abs(sum(r for r, sign in zip(ranks, signs, strict=True) if sign) - middle) >= seen - 1e-9
        for signs in product((False, True), repeat=len(kept))
    ]
    return sum(extreme) / len(extreme)


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        [0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7],
        # equal sizes, and in the next case a zero
        [0.1, -0.1, 0.3, 0.4, 0.4, 0.6, 0.7],
        [0.0, 0.2, 0.3, -0.4, 0.5, 0.6, 0.7, 0.8],
    ],
)
def test_wilcoxon_is_the_share_of_signs_at_least_as_extreme(differences: list[float]) -> None:
    outcome = wilcoxon(named(differences), named([0.0] * len(differences)))
    assert outcome.p == pytest.approx(by_enumeration(differences), abs=1e-9)
    assert outcome.difference == pytest.approx(sum(differences) / len(differences))


def test_wilcoxon_of_six_that_agree_is_two_of_sixty_four() -> None:
    outcome = wilcoxon(named([0.91, 0.82, 0.73, 0.64, 0.55, 0.46]), named([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]))
    assert outcome.p == pytest.approx(2 / 64)


def test_wilcoxon_of_equal_systems_and_of_swapped_ones() -> None:
    a, b = named([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]), named([0.8, 0.9, 0.4, 0.5, 0.1, 0.2, 0.25])
    assert wilcoxon(a, a).p == 1.0
    there, back = wilcoxon(a, b), wilcoxon(b, a)
    assert there.p == back.p
    assert there.difference == -(back.difference or 0)


def test_wilcoxon_says_when_there_are_too_few_categories() -> None:
    a, b = named([0.9, 0.8, 0.7, 0.6, 0.5]), named([0.1, 0.2, 0.3, 0.4, 0.45, 0.0])
    outcome = wilcoxon(a, b)
    assert (outcome.p, outcome.n) == (None, MIN_CATEGORIES - 1)
    assert "5 of the 6 categories" in outcome.reason
    assert outcome.difference == pytest.approx((0.8 + 0.6 + 0.4 + 0.2 + 0.05) / 5)
    assert wilcoxon(a, {"other": 1.0}).difference is None


def test_wilcoxons_p_under_no_difference_errs_no_more_often_than_its_level() -> None:
    rng = np.random.default_rng(6)
    ps = [wilcoxon(named(rng.normal(size=12).tolist()), named([0.0] * 12)).p or 0 for _ in range(600)]
    # 5 % of 600 is 30, with a standard deviation of 5.3
    assert 12 <= sum(p <= 0.05 for p in ps) <= 48


# ---------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    # ascending 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1; the third must not be below the second
    assert holm([0.03, 0.01, None, 0.5, 0.02]) == pytest.approx([0.06, 0.04, None, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None, None]) == [None, None]
    # ascending: 0.01 x 3, 0.02 x 2, 0.04 x 1 (never below the previous one); None is not counted
    assert holm([0.04, None, 0.01, 0.02]) == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_and_keeps_the_order(ps: list[float]) -> None:
    corrected = [p if p is not None else -1.0 for p in holm(ps)]
    assert all(after >= before for before, after in zip(ps, corrected, strict=True))
    assert max(corrected) <= 1
    for p, one in zip(ps, corrected, strict=True):
        for q, other in zip(ps, corrected, strict=True):
            assert p > q or one <= other
