"""The robust standard deviation, against the quantiles of a normal distribution and by hand."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from medad.base.robust import MAD_TO_SD, robust_sd


def test_the_factor_is_that_of_the_normal_distribution() -> None:
    assert round(1 / NormalDist().inv_cdf(0.75), 4) == MAD_TO_SD


def test_it_is_the_standard_deviation_of_normal_values_and_outliers_hardly_change_it() -> None:
    values = np.array([NormalDist(40, 7).inv_cdf((n + 0.5) / 2000) for n in range(2000)])
    assert robust_sd(values) == pytest.approx(7, rel=1e-3)
    values[:20] = 1e6
    assert robust_sd(values) == pytest.approx(7, rel=0.03)


def test_the_centre_may_be_given() -> None:
    values = np.array([[1, 2], [3, 10]], np.float32)
    assert robust_sd(values) == 1.4826  # median 2.5, deviations 1.5, 0.5, 0.5, 7.5
    assert robust_sd(values, centre=1.0) == 1.5 * 1.4826  # deviations 0, 1, 2, 9
