"""Voxels without a measurement: NaN, infinite, or values that no CT can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.ct import io
from tests.medad.ct_volumes import orientation_affine, save

AFFINE = orientation_affine((0, 1, 2), (-1, -1, 1))


def body() -> NDArray[np.float32]:
    """Return a cylinder of tissue with a lung in it, in air that has noise."""
    hu = np.full((30, 30, 12), -1000, np.float32)
    x, y = np.mgrid[:30, :30] - 14.5
    hu[x**2 + y**2 < 100] = 50
    hu[x**2 + y**2 < 9] = -850
    return hu


def read(tmp_path: Path, hu: NDArray[np.float32]) -> io.Volume:
    save(tmp_path / "scan.nii.gz", hu, AFFINE)
    return io.read_scan(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_outside_the_body_is_air(tmp_path: Path, bad: float) -> None:
    hu, expected = body(), body()
    hu[:3], hu[:, :, 11], hu[0, 29, 5] = bad, bad, np.nan  # a border, the last plane, a corner
    expected[:3], expected[:, :, 11], expected[0, 29, 5] = -1024, -1024, -1024
    volume = read(tmp_path, hu)
    np.testing.assert_array_equal(volume.hu, expected)
    count = int((~np.isfinite(hu)).sum())
    assert volume.notes == (f"voxels outside the body that are NaN or infinite count as air: {count}",)
    np.testing.assert_array_equal(volume.cleared, ~np.isfinite(hu))
    liver = np.zeros(hu.shape, np.bool_)
    liver[12:18, 6:10, 4:8] = True
    io.check_padding(volume.cleared, liver, tmp_path)
    liver[12, 8, 11] = True
    with pytest.raises(InputError, match=r"voxels of the liver mask are NaN, infinite or padding \(1 found\)"):
        io.check_padding(volume.cleared, liver, tmp_path)


@pytest.mark.parametrize(
    "where",
    [np.s_[8, 14, 5], np.s_[14, 14, 5], np.s_[:, :, 6]],
    ids=["tissue", "lung", "a plane between two others"],
)
def test_what_is_not_finite_inside_the_body_is_refused(tmp_path: Path, where: tuple[slice | int, ...]) -> None:
    hu = body()
    hu[where] = np.nan
    with pytest.raises(InputError, match="voxels inside the body are NaN or infinite"):
        read(tmp_path, hu)


def test_a_scan_that_is_mostly_not_finite_is_refused(tmp_path: Path) -> None:
    hu = body()
    hu[hu < -900] = np.nan
    with pytest.raises(InputError, match=r"\d+ of 10800 voxels are NaN or infinite"):
        read(tmp_path, hu)


@pytest.mark.parametrize("value", [-99999, -32768, 99999, 32767, -8192])
def test_padding_in_the_corners_is_air(tmp_path: Path, value: float) -> None:
    hu, expected = body(), body()
    hu[:5, :5], expected[:5, :5] = value, -1024
    volume = read(tmp_path, hu)
    np.testing.assert_array_equal(volume.hu, expected)
    assert volume.notes == (f"padding outside the body (value {value}) counts as air: 300 voxels",)


def test_padding_inside_the_body_is_refused_and_metal_is_kept(tmp_path: Path) -> None:
    hu = body()
    hu[8, 14, 5] = -99999
    with pytest.raises(InputError, match="values are from -99999 to -99999 in 1 voxels inside the body"):
        read(tmp_path, hu)
    hu[8, 14, 5] = 32000
    hu[9, 14, 5] = -5000  # a streak beside the metal
    volume = read(tmp_path, hu)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.notes == ()


def test_usual_values_are_read_exactly(tmp_path: Path) -> None:
    hu = body()
    hu[:5, :5], hu[8, 14, 5] = -3024, 3071
    volume = read(tmp_path, hu)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.notes == ()
    assert volume.cleared is None


def test_a_wrong_scale_is_not_taken_for_padding(tmp_path: Path) -> None:
    volume = read(tmp_path, body() * 10)
    np.testing.assert_array_equal(volume.hu, body() * 10)
