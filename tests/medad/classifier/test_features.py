"""Features of voxels, against literal loops, brute force and laws."""

from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray
from scipy.spatial.distance import cdist

from medad.classifier.features import DIFFERENCES_MM, NAMES, SCALES_MM, LiverStack, voxel_features

SPACING_MM = (3.0, 2.0, 2.0)


def _organ() -> ndarray:
    organ = np.zeros((9, 22, 22), bool)
    organ[1:8, 4:17, 3:15] = True
    organ[3:6, 4:8, 3:9] = False
    organ[:2, 10:14, 8:12] = True
    return organ


def _stack(seed: int = 0, spread_hu: float = 20.0) -> LiverStack:
    organ = _organ()
    hu = np.random.default_rng(seed).normal(0, spread_hu, organ.shape)
    return LiverStack(np.where(organ, hu, 0).astype(np.float32), organ, SPACING_MM)


def _column(features: ndarray, name: str) -> ndarray:
    found: ndarray = features[:, NAMES.index(name)]
    return found


def _literal_mean(values: ndarray, organ: ndarray, sigma_mm: float) -> ndarray:
    """Return for each liver voxel the Gaussian mean over liver voxels, in a box of three standard deviations."""
    at = np.argwhere(organ)
    reach = [int(3 * sigma_mm / step + 0.5) for step in SPACING_MM]
    means = []
    for here in at:
        offset = at - here
        near = (np.abs(offset) <= reach).all(1)
        weight = np.exp(-0.5 * ((offset[near] * SPACING_MM / sigma_mm) ** 2).sum(1))
        means.append((weight * values[organ][near]).sum() / weight.sum())
    return np.array(means)


def test_there_is_one_name_for_each_column_and_a_row_for_each_liver_voxel() -> None:
    features = voxel_features(_stack())
    assert features.shape == (np.count_nonzero(_organ()), len(NAMES))
    assert features.dtype == np.float32
    assert len(set(NAMES)) == len(NAMES)
    assert np.isfinite(features).all()


def test_a_constant_liver_has_no_contrast_anywhere() -> None:
    """All columns are zero but those that describe the shape, and the smallest spread that is divided by."""
    organ = _organ()
    features = voxel_features(LiverStack(np.where(organ, np.float32(37), np.float32(-500)), organ, SPACING_MM))
    shape = {"depth_mm", "liver_share", "noise_hu", "liver_spread_hu"}
    for name in NAMES:
        if name not in shape:
            assert np.abs(_column(features, name)).max() < 1e-4, name
    assert (_column(features, "noise_hu") == 0.5).all()
    assert (_column(features, "liver_spread_hu") == 0.5).all()


def test_a_fine_mean_equals_the_literal_normalised_mean() -> None:
    stack = _stack()
    hu = stack.hu - np.median(stack.hu[stack.organ])
    features = voxel_features(stack)
    assert np.allclose(_column(features, "mean_0"), hu[stack.organ], atol=1e-4)
    for mm in (3.0, 5.0):
        expected = _literal_mean(hu, stack.organ, mm)
        assert np.allclose(_column(features, f"mean_{mm:g}"), expected, atol=2e-3)


def test_a_mean_on_a_coarser_grid_is_close_to_the_literal_one() -> None:
    stack = _stack(spread_hu=0)
    ramp = np.indices(stack.organ.shape) * np.array(SPACING_MM)[:, None, None, None]
    hu = np.where(stack.organ, 2 * ramp[1] - ramp[2] + 3 * ramp[0], 0).astype(np.float32)
    hu -= np.where(stack.organ, np.median(hu[stack.organ]), np.float32(0))
    features = voxel_features(LiverStack(hu, stack.organ, SPACING_MM))
    for mm in (12.0, 20.0):
        expected = _literal_mean(hu, stack.organ, mm)
        assert np.abs(_column(features, f"mean_{mm:g}") - expected).max() < 0.06 * np.ptp(hu[stack.organ])


def test_differences_and_local_spreads_follow_from_the_means() -> None:
    stack = _stack()
    hu = stack.hu - np.median(stack.hu[stack.organ])
    features = voxel_features(stack)
    for fine, coarse in DIFFERENCES_MM:
        expected = _column(features, f"mean_{fine:g}") - _column(features, f"mean_{coarse:g}")
        assert np.allclose(_column(features, f"difference_{fine:g}_{coarse:g}"), expected, atol=1e-4)
    variance = _literal_mean(hu**2, stack.organ, 4.0) - _literal_mean(hu, stack.organ, 4.0) ** 2
    assert np.allclose(_column(features, "spread_4"), np.sqrt(variance), atol=0.01)


def test_depth_is_the_distance_to_the_nearest_voxel_outside() -> None:
    """Compare all pairs of voxels. Before the first plane and after the last one nothing counts."""
    organ = _organ()
    around = np.pad(organ, ((0, 0), (1, 1), (1, 1)))
    expected = cdist(np.argwhere(around) * SPACING_MM, np.argwhere(~around) * SPACING_MM).min(1)
    features = voxel_features(_stack())
    assert np.allclose(_column(features, "depth_mm"), expected, atol=1e-4)


def test_a_liver_that_fills_its_planes_is_surrounded_at_their_edges() -> None:
    organ = np.ones((3, 8, 8), bool)
    depth = LiverStack(np.zeros(organ.shape, np.float32), organ, SPACING_MM).depth_mm
    place = np.arange(8)
    to_edge = np.minimum(place, 7 - place) + 1
    assert np.allclose(depth, 2.0 * np.minimum(to_edge[:, None], to_edge))


def test_deviations_do_not_change_with_the_contrast_and_means_follow_it() -> None:
    stack = _stack(spread_hu=400)
    once, twice = voxel_features(stack), voxel_features(stack.with_hu(stack.hu * 2))
    for mm in SCALES_MM:
        assert np.allclose(_column(twice, f"deviation_{mm:g}"), _column(once, f"deviation_{mm:g}"), atol=1e-3)
        assert np.allclose(_column(twice, f"mean_{mm:g}"), 2 * _column(once, f"mean_{mm:g}"), atol=0.02)
    for name in ("spread_8", "hessian_4_low", "white_top_hat_8", "noise_hu", "liver_spread_hu"):
        assert np.allclose(_column(twice, name), 2 * _column(once, name), rtol=1e-3, atol=0.05)


def test_features_do_not_depend_on_the_median_or_on_what_is_outside() -> None:
    stack = _stack()
    shifted = voxel_features(stack.with_hu(np.where(stack.organ, stack.hu + 55, np.float32(900))))
    assert np.allclose(shifted, voxel_features(stack), atol=2e-3)


def test_features_do_not_depend_on_where_the_liver_lies() -> None:
    """Move the liver in larger planes: features that look no farther than the liver stay the same."""
    stack = _stack()
    pad = ((0, 0), (13, 4), (6, 11))
    moved = LiverStack(np.pad(stack.hu, pad), np.pad(stack.organ, pad), SPACING_MM)
    names = [name for name in NAMES if name != "liver_share"]
    columns = [NAMES.index(name) for name in names]
    assert np.allclose(voxel_features(moved)[:, columns], voxel_features(stack)[:, columns], atol=2e-3)


def test_hessian_eigenvalues_are_those_of_a_quadratic() -> None:
    """The quadratic 0.02 x² - 0.03 y² has second derivatives 0.04 and -0.06 HU per mm², which smoothing keeps."""
    organ = np.ones((15, 41, 41), bool)
    y, x = (np.indices(organ.shape)[axis] * 2.0 - 40 for axis in (1, 2))
    hu = (0.02 * x**2 - 0.03 * y**2).astype(np.float32)
    chosen = np.zeros(organ.shape, bool)
    chosen[7, 20, 20] = True
    features = voxel_features(LiverStack(hu, organ, SPACING_MM), chosen)
    expected = np.array([-0.06, 0.0, 0.04]) * 4.0**2
    got = [_column(features, f"hessian_4_{order}")[0] for order in ("low", "middle", "high")]
    assert got == pytest.approx(expected, abs=0.02)


def test_a_bright_spot_is_in_the_white_top_hat_and_a_dark_one_in_the_black_top_hat() -> None:
    organ = np.ones((9, 30, 30), bool)
    for sign, name, other in ((1, "white", "black"), (-1, "black", "white")):
        hu = np.zeros(organ.shape, np.float32)
        hu[4, 15, 15] = sign * 100
        chosen = np.zeros(organ.shape, bool)
        chosen[4, 15, 15] = True
        features = voxel_features(LiverStack(hu, organ, SPACING_MM), chosen)
        peak = sign * _column(features, "mean_3")[0]
        assert _column(features, f"{name}_top_hat_16")[0] == pytest.approx(peak, rel=0.05)
        assert _column(features, f"{other}_top_hat_16")[0] == pytest.approx(0, abs=1e-4)


def test_chosen_voxels_have_the_rows_of_the_whole() -> None:
    stack = _stack()
    chosen = stack.organ & (np.random.default_rng(3).random(stack.organ.shape) < 0.2)
    assert np.array_equal(voxel_features(stack, chosen), voxel_features(stack)[chosen[stack.organ]])


def test_other_hu_keep_the_shape_features() -> None:
    stack = _stack()
    other = stack.with_hu(stack.hu + 1)
    assert other.depth_mm is stack.depth_mm
    assert other.liver_share is stack.liver_share
    fresh = LiverStack(other.hu, stack.organ, SPACING_MM)
    assert np.array_equal(other.depth_mm, fresh.depth_mm)
    assert np.array_equal(other.liver_share, fresh.liver_share)
