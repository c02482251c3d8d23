"""Prepared slices as planes of similar thickness: groups, means over liver voxels, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray

from medad.classifier.stacking import Stacking
from medad.ct.geometry import Geometry
from medad.slices.grid import SliceGrid, Slices
from medad.slices.prepared_file import PreparedCase
from medad.slices.stack import fill_planes

SIDE = 6


def _case(z: list[int], spacing_mm: float, pixels: ndarray | None = None, organ: ndarray | None = None) -> PreparedCase:
    shape = (len(z), SIDE, SIDE)
    organ = np.ones(shape, bool) if organ is None else organ
    pixels = np.full(shape, 100, np.uint8) if pixels is None else pixels
    slices = Slices(pixels, organ, np.array(z), SliceGrid((SIDE, SIDE), max(z) + 1, SIDE))
    geometry = Geometry((SIDE, SIDE, max(z) + 1), np.diag([-2.0, -3.0, spacing_mm, 1.0]))
    return PreparedCase(slices, geometry, None, 0.5)


@pytest.mark.parametrize(("spacing_mm", "group"), [(0.6, 4), (1.0, 2), (1.25, 2), (2.5, 1), (3.0, 1), (8.0, 1)])
def test_thin_planes_are_grouped_to_about_two_and_a_half_millimetres(spacing_mm: float, group: int) -> None:
    case = _case([0, 1, 2], spacing_mm)
    stacking = Stacking.of(case)
    assert stacking.group == group
    assert stacking.stack(case).spacing_mm == pytest.approx((spacing_mm * group, 3.0, 2.0))


def test_missing_planes_are_zero() -> None:
    values = np.arange(3 * SIDE * SIDE, dtype=np.float32).reshape(3, SIDE, SIDE) + 1
    filled = fill_planes(values, np.array([4, 5, 8]))
    assert filled.shape == (5, SIDE, SIDE)
    assert np.array_equal(filled[[0, 1, 4]], values)
    assert not filled[2:4].any()
    assert fill_planes(values > 0, np.array([4, 5, 8])).dtype == bool


def test_a_group_is_the_mean_of_its_planes_and_the_last_may_be_smaller() -> None:
    values = np.random.default_rng(0).random((5, SIDE, SIDE)).astype(np.float32)
    got = Stacking(np.array([2, 3, 4, 5, 6]), 2).mean(values)
    expected = [values[0:2].mean(0), values[2:4].mean(0), values[4]]
    assert np.allclose(got, expected, atol=1e-6)


def test_a_plane_without_a_slice_counts_as_zero() -> None:
    values = np.ones((3, SIDE, SIDE), np.float32)
    assert Stacking(np.array([0, 2, 3]), 2).mean(values)[:, 0, 0].tolist() == [0.5, 1.0]


def test_single_planes_go_there_and_back_unchanged() -> None:
    values = np.random.default_rng(0).random((3, SIDE, SIDE)).astype(np.float32)
    stacking = Stacking(np.array([7, 9, 12]), 1)
    assert np.array_equal(stacking.to_slices(stacking.mean(values)), values)


def test_slices_get_the_values_of_their_group() -> None:
    planes = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((1, SIDE, SIDE), np.float32)
    stacking = Stacking(np.array([5, 6, 7, 9, 10]), 2)
    assert stacking.to_slices(planes)[:, 0, 0].tolist() == [0, 0, 1, 2, 2]


def test_a_stack_is_the_mean_hu_over_liver_voxels_from_the_median() -> None:
    pixels = np.full((4, SIDE, SIDE), 100, np.uint8)
    organ = np.ones(pixels.shape, bool)
    pixels[0, 0, 0], pixels[1, 0, 0] = 110, 120
    organ[2, 1, 1] = False
    pixels[2, 1, 1], pixels[3, 1, 1] = 0, 90
    organ[2:, 2, 2] = False
    case = _case([0, 1, 2, 3], 1.2, pixels, organ)
    stack = Stacking.of(case).stack(case)
    assert stack.hu.shape == (2, SIDE, SIDE)
    assert stack.hu[0, 0, 0] == pytest.approx(30), "grey values 10 and 20 above the median, at 0.5 per HU"
    assert stack.hu[1, 1, 1] == pytest.approx(-20), "only the plane with liver counts"
    assert stack.organ[1, 1, 1]
    assert not stack.organ[1, 2, 2]
    assert stack.hu[1, 2, 2] == 0
    assert np.median(stack.hu[stack.organ]) == 0


def test_a_missing_plane_is_outside_the_liver() -> None:
    case = _case([0, 1, 4], 3.0)
    organ = Stacking.of(case).stack(case).organ
    assert organ.any((1, 2)).tolist() == [True, True, False, False, True]
