"""The coarse grid: means, and the way back to the scan's grid."""

from __future__ import annotations

import numpy as np
import pytest

from medad.organ.coarse import above_on_grid, coarse_shape, to_coarse


def test_the_number_of_voxels() -> None:
    assert coarse_shape((512, 512, 118), (0.74, 0.74, 1.6), 4.0) == (95, 95, 47)
    assert coarse_shape((10, 10, 1), (0.1, 1.0, 1.0), 4.0) == (1, 2, 1)


def test_coarse_voxels_are_means() -> None:
    values = np.arange(4 * 6 * 66, dtype=np.float32).reshape(4, 6, 66) - 500  # more planes than one chunk
    expected = values.reshape(2, 2, 3, 2, 33, 2).mean((1, 3, 5))
    assert to_coarse(values, (2, 3, 33)) == pytest.approx(expected, abs=1e-2)


def test_thick_slices_are_interpolated() -> None:
    values = np.broadcast_to(np.array([0, 100], np.float32), (4, 4, 2))
    assert to_coarse(values, (4, 4, 4))[0, 0] == pytest.approx([0, 25, 75, 100])


def test_reversed_views_are_read() -> None:
    values = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    assert to_coarse(values[::-1, :, ::-1], (4, 4, 4)) == pytest.approx(
        to_coarse(values, (4, 4, 4))[::-1, :, ::-1], abs=1e-5
    )


@pytest.mark.parametrize("shape", [(40, 32, 24), (37, 29, 70), (20, 16, 5)])
def test_a_plane_returns_to_its_place(shape: tuple[int, int, int]) -> None:
    """A half space, given by its signed distance, has the same border on a fine grid up to one voxel."""
    coarse = (20, 16, 12)
    for axis in range(3):
        centres = (np.arange(coarse[axis]) + 0.5) / coarse[axis]
        level = np.zeros(coarse, np.float32) + np.expand_dims(centres - 0.4, [a for a in range(3) if a != axis])
        fine = (np.arange(shape[axis]) + 0.5) / shape[axis] > 0.4
        found = above_on_grid(level.astype(np.float32), shape).any(tuple(a for a in range(3) if a != axis))
        assert np.count_nonzero(found != fine) <= 1


def test_one_coarse_plane_covers_all_planes() -> None:
    level = np.full((4, 4, 1), 1, np.float32)
    assert above_on_grid(level, (8, 8, 3)).all()
