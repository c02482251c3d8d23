"""Paired t-tests against the formula written out, and their undefined cases."""

from __future__ import annotations

import math

import pytest
from scipy import special

from medad.reporting.paired_tests import holm, paired_t


def test_it_is_students_formula() -> None:
    a, b = {0: 0.5, 1: 0.7, 2: 0.6, 3: 0.4}, {0: 0.4, 1: 0.5, 2: 0.65, 3: 0.1}
    differences = [a[key] - b[key] for key in a]
    mean = sum(differences) / 4
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3)
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


def test_holm_by_hand() -> None:
    # rising: 0.01 x 3, 0.02 x 2, 0.04 x 1 (never below one before it); None takes no part
    assert holm([0.04, None, 0.01, 0.02]) == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
