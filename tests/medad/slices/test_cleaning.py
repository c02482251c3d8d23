"""Fat in a liver mask: what is removed, what stays, and how much."""

from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray
from scipy import ndimage

from medad.config.liver import PreprocessSettings
from medad.slices.cleaning import remove_fat

SPACING_MM = (2.0, 2.0, 3.0)


def _settings(fat_hu: float | None = 0.0, margin_mm: float = 4.0) -> PreprocessSettings:
    return PreprocessSettings(fat_hu=fat_hu, fat_margin_mm=margin_mm)


def _box() -> ndarray:
    liver = np.zeros((44, 40, 20), bool)
    liver[5:39, 6:35, 3:17] = True
    return liver


def _slab(liver: ndarray, below: int) -> ndarray:
    """Return 100 HU, and fat of -100 HU at x < `below`, inside the mask and beyond it."""
    hu = np.full(liver.shape, 100, np.float32)
    hu[:below] = -100
    return hu


@pytest.mark.parametrize("margin_mm", [0.0, 3.0, 4.0, 7.9])
def test_fat_at_the_surface_goes_with_its_margin(margin_mm: float) -> None:
    """A plane between fat and liver stays in its place when smoothed, so the removed voxels are known."""
    liver = _box()
    cleaned = remove_fat(_slab(liver, 12), liver, SPACING_MM, _settings(margin_mm=margin_mm))
    expected = liver.copy()
    expected[: 12 + int(margin_mm / 2)] = False
    assert np.array_equal(cleaned, expected)


def test_fine_pixels_are_cleaned_in_steps_of_two() -> None:
    """Every second pixel decides, so the border lies within two pixels, and the mask's sides are left out."""
    liver = _box()
    cleaned = remove_fat(_slab(liver, 13), liver, (0.8, 0.8, 3.0), _settings(margin_mm=3.2))
    first = int(np.flatnonzero(cleaned[:, 8:33].any((1, 2)))[0])
    assert first == pytest.approx(13 + 4, abs=2)
    expected = liver.copy()
    expected[:first] = False
    assert np.array_equal(cleaned[:, 8:33], expected[:, 8:33])


def test_a_wedge_goes_and_a_ball_of_fat_inside_stays() -> None:
    liver = _box()
    hu = np.full(liver.shape, 100, np.float32)
    x, y, z = (np.indices(liver.shape)[axis] for axis in range(3))
    wedge = (x < 16) & (np.abs(y - 20) * 2 < 16 - x)
    ball = ((x - 30) * 2) ** 2 + ((y - 20) * 2) ** 2 + ((z - 10) * 3) ** 2 < 9**2
    hu[wedge | ball] = -100
    cleaned = remove_fat(hu, liver, SPACING_MM, _settings())
    removed = liver & ~cleaned
    assert not (removed & (ndimage.binary_dilation(ball, iterations=2))).any()
    thick = ndimage.binary_erosion(wedge, np.ones((3, 3, 1)), border_value=1) & liver
    assert removed[thick].all()
    distance = ndimage.distance_transform_edt(~wedge, sampling=SPACING_MM)
    assert distance[removed].max() <= 4
    voxel_ml = np.prod(SPACING_MM) / 1000
    near = np.count_nonzero(liver & (distance <= 4)) * voxel_ml
    assert 0.6 * near < np.count_nonzero(removed) * voxel_ml <= near


def test_only_the_mask_shrinks_and_only_within_the_liver() -> None:
    liver = _box()
    rng = np.random.default_rng(0)
    hu = (ndimage.gaussian_filter(rng.standard_normal(liver.shape), 3) * 2000).astype(np.float32)
    before = liver.copy()
    cleaned = remove_fat(hu, liver, SPACING_MM, _settings(fat_hu=-60))
    assert np.array_equal(liver, before)
    assert not (cleaned & ~liver).any()
    assert 0 < np.count_nonzero(liver & ~cleaned) < np.count_nonzero(liver)


def test_without_a_limit_or_without_fat_the_mask_is_as_it_was() -> None:
    liver = _box()
    hu = _slab(liver, 12)
    assert remove_fat(hu, liver, SPACING_MM, _settings(fat_hu=None)) is liver
    assert np.array_equal(remove_fat(hu, liver, SPACING_MM, _settings(fat_hu=-200)), liver)
    empty = np.zeros_like(liver)
    assert not remove_fat(hu, empty, SPACING_MM, _settings()).any()


def test_the_end_of_the_scan_is_not_a_surface() -> None:
    """Fat inside a liver that the first plane cuts does not reach the surface there."""
    liver = _box()
    liver[5:39, 6:35, :3] = True
    hu = np.full(liver.shape, 100, np.float32)
    hu[18:26, 16:24, :4] = -100
    assert np.array_equal(remove_fat(hu, liver, SPACING_MM, _settings()), liver)


def test_a_mask_of_fat_alone_becomes_empty() -> None:
    liver = _box()
    hu = np.full(liver.shape, -100, np.float32)
    assert not remove_fat(hu, liver, SPACING_MM, _settings()).any()
