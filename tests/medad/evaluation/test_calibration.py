"""The common scale and the calibrated threshold, on hand-made maps and curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from medad.base.numbers import logit
from medad.evaluation.calibration import (
    THRESHOLDS,
    Calibration,
    CalibrationCurve,
    choose_threshold,
    healthy_middle,
    to_common_scale,
)

COUNT = len(THRESHOLDS)


def _map(seed: int = 0, size: int = 501) -> tuple[ndarray, ndarray]:
    rng = np.random.default_rng(seed)
    return rng.beta(1, 6, size).astype(np.float32), rng.random(size) < 0.7


def _curve(marked_ml: ndarray, *dice: ndarray) -> CalibrationCurve:
    return CalibrationCurve(np.asarray(marked_ml, float), np.array(dice, float).reshape(-1, COUNT))


def _peak(at: int, height: float = 0.8) -> ndarray:
    return height - 0.01 * np.abs(np.arange(COUNT) - at)


FALLING_ML = np.linspace(50, 0, COUNT)


def test_the_logit_is_exact_and_limited() -> None:
    p = np.array([0.1, 0.5, 0.9, 0.0, 1.0], np.float32)
    expected = [np.log(1 / 9), 0, np.log(9), -12, 12]
    assert logit(p) == pytest.approx(expected, abs=1e-5)
    assert logit(p).dtype == np.float32


@given(seed=st.integers(0, 50), middle=st.floats(-6, 3))
def test_the_common_scale_moves_the_median_and_keeps_the_order(seed: int, middle: float) -> None:
    probability, organ = _map(seed)
    moved = to_common_scale(probability, organ, middle)
    assert healthy_middle(moved, organ) == pytest.approx(middle, abs=1e-4)
    assert (moved[~organ] == 0).all()
    order = np.argsort(probability[organ], kind="stable")
    assert (np.diff(moved[organ][order]) >= 0).all()
    assert np.allclose(to_common_scale(moved, organ, middle), moved, atol=2e-5)


def test_the_common_scale_is_a_shift_of_the_logit() -> None:
    probability, organ = _map()
    shift = logit(to_common_scale(probability, organ, -1.0))[organ] - logit(probability)[organ]
    assert np.ptp(shift) < 2e-3
    same = to_common_scale(probability, organ, healthy_middle(probability, organ))
    assert np.allclose(same[organ], probability[organ], atol=1e-6)


def test_two_scans_that_differ_by_a_shift_become_equal() -> None:
    probability, organ = _map()
    other = (1 / (1 + np.exp(-(logit(probability) + 1.3)))).astype(np.float32)
    one, two = (to_common_scale(each, organ, -2.0) for each in (probability, other))
    assert np.allclose(one, two, atol=1e-5)


def test_the_best_dice_decides_if_it_marks_little() -> None:
    found = choose_threshold([_curve(FALLING_ML, _peak(30), _peak(30))], -3.0, 40.0)
    assert found.decided_by == "dice"
    assert found.threshold == THRESHOLDS[30]
    assert found.dice == pytest.approx(0.8)
    assert found.marked_ml == pytest.approx(FALLING_ML[30])
    assert (found.middle, found.allowed_ml, found.healthy_scans, found.copies) == (-3.0, 40.0, 1, 2)


def test_the_allowed_volume_decides_if_the_best_dice_marks_more() -> None:
    """Allow 10 ml of a curve that falls from 50 ml to 0: the best allowed threshold is the first allowed one."""
    found = choose_threshold([_curve(FALLING_ML, _peak(10))], -3.0, 10.0)
    first = int(np.argmax(FALLING_ML <= 10.0))
    assert found.decided_by == "false positives"
    assert found.threshold == THRESHOLDS[first]
    assert found.marked_ml <= 10 < FALLING_ML[first - 1]


def test_the_ends_of_the_range_decide_if_they_are_reached() -> None:
    lowest = choose_threshold([_curve(FALLING_ML, _peak(0))], 0.0, 60.0)
    highest = choose_threshold([_curve(FALLING_ML, _peak(COUNT - 1))], 0.0, 60.0)
    none_allowed = choose_threshold([_curve(FALLING_ML + 20, _peak(5))], 0.0, 10.0)
    assert (lowest.decided_by, lowest.threshold) == ("lowest threshold", THRESHOLDS[0])
    assert (highest.decided_by, highest.threshold) == ("highest threshold", THRESHOLDS[-1])
    assert (none_allowed.decided_by, none_allowed.threshold) == ("highest threshold", THRESHOLDS[-1])
    assert none_allowed.marked_ml > none_allowed.allowed_ml


def test_volumes_are_means_over_scans_and_dice_over_copies() -> None:
    """One scan with three copies outweighs another with one copy in the Dice, but not in the volume."""
    one = _curve(np.full(COUNT, 2.0), _peak(10), _peak(10), _peak(10))
    two = _curve(np.full(COUNT, 8.0), _peak(30))
    found = choose_threshold([one, two], 0.0, 5.0)
    assert found.threshold == THRESHOLDS[10]
    assert found.marked_ml == 5
    assert found.dice == pytest.approx((3 * 0.8 + 0.6) / 4)
    assert (found.healthy_scans, found.copies) == (2, 4)


def test_equal_dice_give_the_lowest_allowed_threshold() -> None:
    found = choose_threshold([_curve(FALLING_ML, np.full(COUNT, 0.5))], 0.0, 25.0)
    assert found.threshold == THRESHOLDS[int(np.argmax(FALLING_ML <= 25.0))]


def test_a_calibration_is_json_and_back() -> None:
    found = choose_threshold([_curve(FALLING_ML, _peak(30))], -3.0, 40.0)
    assert Calibration.model_validate_json(found.model_dump_json()) == found
