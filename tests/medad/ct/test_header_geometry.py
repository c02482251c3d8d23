"""Headers of NIfTI files whose geometry is incomplete or stated twice, and labels with rounded or cropped grids."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.ct import io
from tests.medad.ct_volumes import SHAPE, linear_index, orientation_affine, save

AFFINE = orientation_affine((0, 1, 2), (-1, -1, 1))
FORMS = ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z")


def write(path: Path, array: NDArray[Any], affine: NDArray[np.float64] = AFFINE, **fields: Any) -> Path:
    """Write a NIfTI file with both forms, and overwrite fields of its header."""
    save(path, array, affine)
    content = bytearray(gzip.decompress(path.read_bytes()))
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def pixdim(*sizes: float) -> list[float]:
    return [1.0, *sizes, 0, 0, 0, 0]


@pytest.mark.parametrize("code", [0, 1], ids=["sform alone", "both codes"])
@pytest.mark.parametrize("sizes", [(-0.7, 0.9, 2.5), (0.7, 0.9, 0.0), (0.0, 0.0, 0.0), (np.nan, 0.9, 2.5)])
def test_a_complete_sform_replaces_sizes_that_are_wrong(tmp_path: Path, sizes: Any, code: int) -> None:
    array = linear_index(SHAPE)
    plain = io.read_scan(write(tmp_path / "plain.nii.gz", array))
    scan = io.read_scan(write(tmp_path / "scan.nii.gz", array, pixdim=pixdim(*sizes), qform_code=code))
    np.testing.assert_array_equal(scan.hu, plain.hu)
    np.testing.assert_array_equal(scan.geometry.affine, plain.geometry.affine)
    assert scan.geometry.canonical_spacing_mm == pytest.approx((0.7, 0.9, 2.5), rel=1e-6)
    [note] = scan.notes
    assert "in pixdim; the" in note
    assert "sform was used" in note
    # outputs have a whole header with the same affine
    io.write_mask(tmp_path / "mask.nii.gz", scan.hu > 3, scan.geometry)
    written = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(written.affine, plain.geometry.affine)
    assert io.read_labels(tmp_path / "mask.nii.gz").notes == ()


def test_a_qform_replaces_an_sform_of_zeros(tmp_path: Path) -> None:
    array, zeros = linear_index(SHAPE), dict.fromkeys(FORMS[2:], np.zeros(4))
    plain = io.read_scan(write(tmp_path / "plain.nii.gz", array))
    scan = io.read_scan(write(tmp_path / "scan.nii.gz", array, **zeros))
    np.testing.assert_array_equal(scan.hu, plain.hu)
    np.testing.assert_allclose(scan.geometry.affine, plain.geometry.affine, atol=1e-5)
    assert scan.notes == ("sform_code is set, but all values of the sform are 0; the qform was used",)
    io.write_mask(tmp_path / "mask.nii.gz", scan.hu > 3, scan.geometry)
    np.testing.assert_allclose(nibabel.load(tmp_path / "mask.nii.gz").affine, plain.geometry.affine, atol=1e-5)
    with pytest.raises(InputError, match="all values of the sform are 0"):
        io.read_scan(write(tmp_path / "none.nii.gz", array, qform_code=0, **zeros))


@pytest.mark.parametrize(
    ("field", "note"),
    [
        ("quatern_c", "the qform contains NaN or infinite values; the sform was used"),
        ("qoffset_x", "the qform contains NaN or infinite values; the sform was used"),
        ("srow_y", "the sform contains NaN or infinite values; the qform was used"),
    ],
)
def test_a_form_that_is_not_finite_is_replaced_by_the_other(tmp_path: Path, field: str, note: str) -> None:
    array = linear_index(SHAPE)
    changes: dict[str, Any] = {field: np.nan}
    scan = io.read_scan(write(tmp_path / "scan.nii.gz", array, **changes))
    np.testing.assert_allclose(scan.geometry.affine, AFFINE, atol=1e-4)
    assert scan.notes == (note,)


def test_a_rounded_quaternion_is_normalised(tmp_path: Path) -> None:
    array, affine = linear_index(SHAPE), np.diag([2.0, -2.0, -3.0, 1.0])  # quaternion (0; 1, 0, 0)
    scan = io.read_scan(write(tmp_path / "a.nii.gz", array, affine, quatern_b=1.0002, sform_code=0))
    np.testing.assert_allclose(scan.geometry.affine, affine, atol=1e-6)
    assert scan.notes == ("the qform's quaternion is longer than 1; it was normalised",)
    with pytest.raises(InputError, match="qform is not a rotation"):
        io.read_scan(write(tmp_path / "b.nii.gz", array, affine, quatern_b=1.2, sform_code=0))
    scan = io.read_scan(write(tmp_path / "c.nii.gz", array, affine, quatern_b=1.2))
    np.testing.assert_array_equal(scan.geometry.affine, affine)
    assert scan.notes == ("the header's qform is not a rotation; the sform was used",)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1)])
def test_an_identity_as_in_lits_gets_a_warning_and_the_given_spacing(tmp_path: Path, signs: Any) -> None:
    array, affine = linear_index(SHAPE), np.diag([*map(float, signs), 1.0])
    path = write(tmp_path / "scan.nii.gz", array, affine)
    [note] = io.read_scan(path).notes
    assert "1 x 1 x 1 mm were assumed" in note
    assert "--spacing-mm X Y Z (data set: --set test_data.spacing_mm=[X,Y,Z], or train_data; inbox: --set" in note
    scan = io.read_scan(path, spacing_mm=(0.7, 0.8, 5.0))
    np.testing.assert_allclose(scan.geometry.affine, affine @ np.diag([0.7, 0.8, 5.0, 1.0]))
    assert scan.notes == ("the given voxel size was used: 0.7 x 0.8 x 5 mm",)
    assert scan.geometry.voxel_mm3 == pytest.approx(0.7 * 0.8 * 5)
    labels, warning = io.read_labels_on(scan.geometry, path, spacing_mm=(0.7, 0.8, 5.0))
    assert warning is None
    np.testing.assert_array_equal(labels.values, scan.hu)
    # outputs keep the file's header, so they lie on the scan in a viewer
    io.write_mask(tmp_path / "mask.nii.gz", scan.hu > 3, scan.geometry)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "mask.nii.gz").affine, affine)
    with pytest.raises(InputError, match=r"voxel size must be 0\.05 to 25 mm"):
        io.read_scan(path, spacing_mm=(0.7, 0.8, 50.0))


def test_a_given_spacing_does_not_change_other_files(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", linear_index(SHAPE))
    scan = io.read_scan(path, spacing_mm=(1.0, 1.0, 1.0))
    assert scan.geometry.canonical_spacing_mm == pytest.approx((0.7, 0.9, 2.5), rel=1e-6)
    assert "so the given one was not used" in scan.notes[0]
    shifted = np.eye(4)
    shifted[0, 3] = -120
    assert io.read_scan(write(tmp_path / "iso.nii.gz", linear_index(SHAPE), shifted)).notes == ()


def test_a_file_without_affine_needs_a_spacing(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", linear_index(SHAPE), qform_code=0, sform_code=0)
    with pytest.raises(InputError, match=r"no affine.*--spacing-mm X Y Z"):
        io.read_scan(path)
    scan = io.read_scan(path, spacing_mm=(0.7, 0.9, 2.5))
    np.testing.assert_array_equal(scan.geometry.affine, np.diag([0.7, 0.9, 2.5, 1.0]))
    assert "check left and right" in scan.notes[0]
    io.write_mask(tmp_path / "mask.nii.gz", scan.hu > 3, scan.geometry)
    assert io.align_labels(io.read_labels(tmp_path / "mask.nii.gz"), scan.geometry, path)[1] is None


def test_two_forms_that_differ_name_the_option(tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += 7
    rows = {name: moved[index] for index, name in enumerate(FORMS[2:])}
    path = write(tmp_path / "scan.nii.gz", linear_index(SHAPE), **rows)
    rule = r"sform and qform differ by up to .* voxels; .*type --affine-from sform \(data set: --set test_data"
    with pytest.raises(InputError, match=rule):
        io.read_scan(path)
    np.testing.assert_allclose(io.read_scan(path, affine_from="sform").geometry.affine, moved, atol=1e-4)
    np.testing.assert_allclose(io.read_scan(path, affine_from="qform").geometry.affine, AFFINE, atol=1e-4)


def liver() -> NDArray[np.uint8]:
    mask = np.zeros((40, 30, 20), np.uint8)
    mask[10:25, 8:20, 5:12] = 1
    return mask


@pytest.mark.parametrize(("shift", "accepted"), [(0.04, True), (0.3, True), (0.5, True), (0.6, False)])
def test_a_rounded_header_of_a_mask_is_a_warning_up_to_half_a_voxel(
    tmp_path: Path, shift: float, accepted: bool
) -> None:
    moved = AFFINE.copy()
    moved[1, 3] += shift * 0.9
    scan = io.read_scan(write(tmp_path / "scan.nii.gz", liver() * np.int16(100)))
    path = write(tmp_path / "mask.nii.gz", liver(), moved)
    if not accepted:
        with pytest.raises(InputError, match=r"0\.6 voxels.*--affine-mismatch warn"):
            io.read_labels_on(scan.geometry, path)
        return
    labels, warning = io.read_labels_on(scan.geometry, path)
    np.testing.assert_array_equal(labels.values, scan.hu / 100)
    assert (warning is None) == (shift < 0.05)
    if warning is not None:
        assert f"up to {shift:g} voxels away" in warning


def test_a_rounded_spacing_in_another_axis_order(tmp_path: Path) -> None:
    """A spacing of 0.9765625 is written as 0.98, and the mask is stored in the order of RAS."""
    exact, rounded = np.diag([-0.9765625, -0.9765625, 3, 1]), np.diag([-0.98, -0.98, 3, 1])
    scan = io.read_scan(write(tmp_path / "scan.nii.gz", liver() * np.int16(100), exact))
    write(tmp_path / "lps.nii.gz", liver(), rounded)
    turned = nibabel.as_closest_canonical(nibabel.load(tmp_path / "lps.nii.gz"))
    nibabel.save(turned, tmp_path / "mask.nii.gz")
    labels, warning = io.read_labels_on(scan.geometry, tmp_path / "mask.nii.gz")
    assert "the header of the label is rounded" in str(warning)
    np.testing.assert_array_equal(labels.values, scan.hu / 100)


def test_a_mask_cut_out_of_the_scans_grid_is_put_back(tmp_path: Path) -> None:
    scan = io.read_scan(write(tmp_path / "scan.nii.gz", liver() * np.int16(100)))
    first, cut = (10, 8, 5), liver()[10:25, 8:20, 5:12]
    affine = AFFINE.copy()
    affine[:, 3] = AFFINE @ [*first, 1]
    write(tmp_path / "cut.nii.gz", cut, affine)
    nibabel.save(nibabel.as_closest_canonical(nibabel.load(tmp_path / "cut.nii.gz")), tmp_path / "turned.nii.gz")
    for name in ("cut", "turned"):
        labels, warning = io.read_labels_on(scan.geometry, tmp_path / f"{name}.nii.gz")
        np.testing.assert_array_equal(labels.values, scan.hu / 100)
        assert "the label covers 15 x 12 x 7 of the scan's 40 x 30 x 20 voxels" in str(warning)
    affine[0, 3] += 12  # beyond the scan's edge
    with pytest.raises(InputError, match="shape mismatch: the label has 15 x 12 x 7 voxels"):
        io.read_labels_on(scan.geometry, write(tmp_path / "out.nii.gz", cut, affine))
