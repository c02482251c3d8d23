"""Reading of volumes: orientation, geometry, number types, grids that match, digests."""

from __future__ import annotations

import gzip
import hashlib
import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.ct import checks, io, scale
from medad.ct.dicom_write import write_dicom
from medad.ct.geometry import GridMatch, match_grids
from medad.ct.io import Geometry
from tests.medad.ct_volumes import (
    NAMES,
    ORIENTATIONS,
    SHAPE,
    SPACING,
    itk_image,
    linear_index,
    orientation_affine,
    save,
    tilt,
    write_slices,
)

HEADER_GEOMETRY = (
    *("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS, ids=NAMES)
@pytest.mark.parametrize("forms", ["both", "sform", "qform"])
def test_every_orientation_there_and_back(tmp_path: Path, axes: Any, signs: Any, forms: str) -> None:
    affine = orientation_affine(axes, signs, degrees=0 if forms == "both" else 8)
    array = linear_index(SHAPE)
    save(tmp_path / "scan.nii.gz", array, affine, forms)
    volume = io.read_scan(tmp_path / "scan.nii.gz")

    # the order is compared with nibabel's reorientation to RAS, converted to LPS
    ras = nibabel.as_closest_canonical(nibabel.load(tmp_path / "scan.nii.gz"))
    np.testing.assert_array_equal(volume.hu, np.asarray(ras.dataobj)[::-1, ::-1])
    # every voxel must have the same patient position as before
    index = np.argwhere(np.ones(volume.hu.shape))
    source_index = np.array(np.unravel_index(volume.hu.astype(int).ravel(), SHAPE)).T
    canonical = apply_affine(volume.geometry.canonical_affine, index)
    original = apply_affine(nibabel.load(tmp_path / "scan.nii.gz").affine, source_index)
    np.testing.assert_allclose(canonical, original, atol=1e-9)

    mask = volume.hu % 3 == 0
    io.write_mask(tmp_path / "mask.nii.gz", mask, volume.geometry)
    io.write_probability(tmp_path / "probability.nii.gz", volume.hu / np.float32(209), volume.geometry)
    source = nibabel.load(tmp_path / "scan.nii.gz")
    for name, expected in (("mask", array % 3 == 0), ("probability", array.astype(np.float32) / np.float32(209))):
        written = nibabel.load(tmp_path / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), expected)
        assert written.affine.tobytes() == source.affine.tobytes()
        for field in HEADER_GEOMETRY:
            assert written.header[field].tobytes() == source.header[field].tobytes(), field
    assert nibabel.aff2axcodes(volume.geometry.canonical_affine) == ("L", "P", "S")
    assert Geometry.from_json(volume.geometry.to_json()) == volume.geometry


def assert_on_itk_grid(volume: io.Volume, image: sitk.Image) -> None:
    """Check that every voxel, found by its unique value, lies where SimpleITK places it."""
    values = sitk.GetArrayViewFromImage(image)
    assert volume.hu.size == values.size
    place = {int(volume.hu[tuple(i)]): i for i in np.argwhere(np.ones(volume.hu.shape))}
    for k, j, i in itertools.product(*(range(n) for n in values.shape)):
        left, posterior, superior = image.TransformIndexToPhysicalPoint((i, j, k))
        ras = volume.geometry.canonical_affine @ [*place[int(values[k, j, i])], 1]
        np.testing.assert_allclose(ras[:3], [-left, -posterior, superior], atol=1e-6)


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS, ids=NAMES)
def test_metaimage_lies_where_simpleitk_says(tmp_path: Path, axes: Any, signs: Any) -> None:
    image = itk_image(axes, signs)
    sitk.WriteImage(image, tmp_path / "scan.mha")
    volume = io.read_scan(tmp_path / "scan.mha")
    assert_on_itk_grid(volume, image)
    # the mask also fits in ITK: same size, same place
    io.write_mask(tmp_path / "mask.nii.gz", volume.hu > 20, volume.geometry)
    mask = sitk.ReadImage(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(mask), sitk.GetArrayViewFromImage(image) > 20)
    for index in ((0, 0, 0), (4, 2, 3)):
        np.testing.assert_allclose(
            mask.TransformIndexToPhysicalPoint(index), image.TransformIndexToPhysicalPoint(index), atol=1e-4
        )
    assert match_grids(volume.geometry, io.read_labels(tmp_path / "mask.nii.gz").geometry, tmp_path) == GridMatch()


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "compressed"])
@pytest.mark.parametrize("name", ["scan.mhd", "scan.mha", "scan.nrrd", "scan.nhdr"])
def test_every_itk_format(tmp_path: Path, name: str, compress: bool) -> None:
    image = itk_image()
    sitk.WriteImage(image, tmp_path / name, compress)
    assert_on_itk_grid(io.read_scan(tmp_path / name), image)
    (tmp_path / name).rename(tmp_path / name.upper())
    assert_on_itk_grid(io.read_scan(tmp_path / name.upper()), image)


def test_dicom_follows_the_standards_equation_and_simpleitk(tmp_path: Path) -> None:
    values = 2 * linear_index((4, 3, 5)) - np.int16(50)
    step = 2.5 * tilt(8)[:, 2]
    origin, row, column = write_slices(tmp_path / "series", values, step)
    (tmp_path / "series" / "DICOMDIR").write_bytes(b"index")
    (tmp_path / "series" / "readme.txt").write_text("notes", encoding="utf-8")
    volume = io.read_scan(tmp_path / "series")
    place = {int(volume.hu[tuple(i)]): i for i in np.argwhere(np.ones(volume.hu.shape))}
    for k, j, i in itertools.product(range(4), range(3), range(5)):
        expected = origin + i * row + j * column + k * step  # PS3.3 C.7.6.2.1.1
        ras = volume.geometry.canonical_affine @ [*place[int(values[k, j, i])], 1]
        np.testing.assert_allclose(ras[:3] * [-1, -1, 1], expected, atol=1e-5)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    image = sitk.ReadImage(names)
    assert_on_itk_grid(volume, image)


def test_dicom_written_reads_back(tmp_path: Path) -> None:
    affine = orientation_affine((0, 1, 2), (-1, -1, 1), degrees=5)
    hu = linear_index(SHAPE).astype(np.float32) - 100
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_dicom(tmp_path / name, hu, affine)
    volume = io.read_scan(tmp_path / "one")
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.geometry.canonical_affine, affine, atol=1e-5)
    for data in (pydicom.dcmread(path) for path in sorted((tmp_path / "one").iterdir())):
        assert str(data.get("PatientName", "")) == ""
        assert data.get("PatientID", "") == ""


def test_single_dicom_slice_takes_its_thickness(tmp_path: Path) -> None:
    write_slices(tmp_path / "series", 2 * linear_index((1, 3, 5)), np.zeros(3))
    assert io.read_scan(tmp_path / "series").geometry.canonical_spacing_mm == pytest.approx((0.7, 0.9, 3.0), rel=1e-6)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i2", "u2", "i4", ">f4", "f4", "f8", "u4", "i8"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image], ids=["nifti1", "nifti2"])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_every_number_type(tmp_path: Path, dtype: str, kind: Any, name: str) -> None:
    array = np.arange(100, dtype=dtype).reshape(4, 5, 5)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    image = kind(array, affine, dtype=dtype)
    header = image.header.as_byteswapped(">") if dtype.startswith(">") else image.header
    kind(array, affine, header=header, dtype=dtype).to_filename(tmp_path / name)
    volume = io.read_scan(tmp_path / name)
    np.testing.assert_array_equal(volume.hu, array.astype(np.float32))
    io.write_mask(tmp_path / "mask.nii.gz", volume.hu > 3, volume.geometry)
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert type(mask) is kind
    assert mask.affine.tobytes() == affine.tobytes()


def test_scale_header_counts_and_slope_zero_means_none(tmp_path: Path) -> None:
    array = linear_index(SHAPE)
    for slope, inter, expected in ((0.5, -1000.0, array * 0.5 - 1000.0), (0.0, 7.0, array), (np.nan, 0.0, array)):
        save(tmp_path / "scan.nii", array, np.diag([-1.0, -1.0, 1.0, 1.0]))
        header = bytearray((tmp_path / "scan.nii").read_bytes())
        header[112:120] = np.array([slope, inter], dtype="<f4").tobytes()
        (tmp_path / "scan.nii").write_bytes(header)
        np.testing.assert_array_equal(io.read_scan(tmp_path / "scan.nii").hu, expected.astype(np.float32))


def test_labels_beyond_a_byte_become_int32_even_in_a_late_slab(tmp_path: Path) -> None:
    labels = np.zeros((256, 256, 80), dtype=np.int16)  # more than one slab of 2^22 voxels
    labels[1, 2, 3], labels[-1, -1, -1] = 7, 300
    save(tmp_path / "label.nii.gz", labels, np.diag([-1.0, -1.0, 1.0, 1.0]))
    read = io.read_labels(tmp_path / "label.nii.gz").values
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, labels)


def test_trailing_axis_of_one_is_dropped(tmp_path: Path) -> None:
    array = linear_index(SHAPE)
    save(tmp_path / "scan.nii.gz", array[..., None], np.diag([-1.0, -1.0, 1.0, 1.0]))
    volume = io.read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.hu, array)
    io.write_mask(tmp_path / "mask.nii.gz", volume.hu > 3, volume.geometry)
    assert nibabel.load(tmp_path / "mask.nii.gz").shape == SHAPE


def test_scale_noise_in_a_label_is_rounded_away(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 6], dtype=np.float32).reshape(2, 2, 1).repeat(3, axis=2)
    save(tmp_path / "label.nii.gz", labels * np.float32(1.000015), np.diag([-1.0, -1.0, 1.0, 1.0]))
    read = io.read_labels(tmp_path / "label.nii.gz").values
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, labels)


def test_gzip_in_members_and_padded_with_zeros(tmp_path: Path) -> None:
    save(tmp_path / "scan.nii", linear_index(SHAPE), np.diag([-1.0, -1.0, 1.0, 1.0]))
    raw = (tmp_path / "scan.nii").read_bytes()
    packed = gzip.compress(raw[:200]) + gzip.compress(raw[200:500]) + gzip.compress(raw[500:]) + b"\0" * 300_000
    (tmp_path / "scan.nii.gz").write_bytes(packed)
    np.testing.assert_array_equal(io.read_scan(tmp_path / "scan.nii.gz").hu, linear_index(SHAPE))


def geometry_of(affine: NDArray[np.float64], shape: tuple[int, int, int] = (64, 64, 30)) -> Geometry:
    return Geometry(shape, affine)


def test_rounding_is_no_mismatch_and_more_than_half_a_voxel_is() -> None:
    affine = orientation_affine((0, 1, 2), (-1, -1, 1), 8)
    label = Path("label.nii.gz")
    for noise in (1e-7, 1e-4):
        moved = affine * (1 + noise)
        assert match_grids(geometry_of(affine), geometry_of(moved), label) == GridMatch()
    affine = orientation_affine((0, 1, 2), (-1, -1, 1))
    moved = affine.copy()
    moved[2, 3] += SPACING[2] / 2
    half = match_grids(geometry_of(affine), geometry_of(moved), label)
    assert "rounded: its grid is up to 0.5 voxels away" in str(half.warning)
    assert not half.by_index
    moved[2, 3] += SPACING[2] / 10
    with pytest.raises(InputError, match=r"label\.nii\.gz: affine mismatch: .* 0\.6 voxels.*--affine-mismatch warn"):
        match_grids(geometry_of(affine), geometry_of(moved), label)
    forced = match_grids(geometry_of(affine), geometry_of(moved), label, affine_mismatch="warn")
    assert "affine mismatch" in str(forced.warning)
    assert forced.by_index


def test_one_grid_stored_in_two_orders_is_one_grid(tmp_path: Path) -> None:
    array = linear_index(SHAPE)
    affine = orientation_affine((0, 1, 2), (1, 1, 1), 5)
    save(tmp_path / "scan.nii.gz", array, affine)
    turned = nibabel.load(tmp_path / "scan.nii.gz").as_reoriented([[2, -1], [0, 1], [1, -1]])
    nibabel.save(turned, tmp_path / "label.nii.gz")
    scan = io.read_scan(tmp_path / "scan.nii.gz")
    labels, warning = io.read_labels_on(scan.geometry, tmp_path / "label.nii.gz")
    assert warning is None
    assert labels.geometry == scan.geometry
    np.testing.assert_array_equal(labels.values, scan.hu)


@pytest.mark.parametrize("forms", ["both", "none"])
def test_mismatch_as_a_warning_matches_voxels_by_index(tmp_path: Path, forms: str) -> None:
    """Read labels like LiTS 28 to 47: their voxels are right, but their affine is the identity or missing."""
    array = linear_index(SHAPE)
    save(tmp_path / "scan.nii.gz", array, orientation_affine((0, 1, 2), (-1, 1, 1)))
    save(tmp_path / "label.nii.gz", array, np.eye(4), forms)
    scan = io.read_scan(tmp_path / "scan.nii.gz")
    with pytest.raises(InputError, match="affine"):
        io.read_labels_on(scan.geometry, tmp_path / "label.nii.gz")
    labels, warning = io.read_labels_on(scan.geometry, tmp_path / "label.nii.gz", affine_mismatch="warn")
    assert warning is not None
    np.testing.assert_array_equal(labels.values, scan.hu)


def test_affine_from_chooses_between_sform_and_qform(tmp_path: Path) -> None:
    sform, qform = np.diag([-2.0, -2.0, 3.0, 1.0]), np.diag([2.0, -2.0, 3.0, 1.0])
    image = nibabel.Nifti1Image(linear_index(SHAPE), sform)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(io.read_scan(tmp_path / "scan.nii.gz", affine_from="sform").geometry.affine, sform)
    volume = io.read_scan(tmp_path / "scan.nii.gz", affine_from="qform")
    np.testing.assert_allclose(volume.geometry.affine, qform)
    # the output contains both forms unchanged, so that any viewer places it correctly
    io.write_mask(tmp_path / "mask.nii.gz", volume.hu > 3, volume.geometry)
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.get_sform(), sform)
    np.testing.assert_array_equal(mask.get_qform(), image.get_qform())


def test_digest_is_of_the_bytes_and_of_every_file(tmp_path: Path) -> None:
    save(tmp_path / "scan.nii.gz", linear_index(SHAPE), np.eye(4))
    expected = hashlib.sha256((tmp_path / "scan.nii.gz").read_bytes()).hexdigest()
    assert io.source_digest(tmp_path / "scan.nii.gz") == expected

    write_slices(tmp_path / "series", 2 * linear_index((4, 3, 5)), 2.5 * tilt(8)[:, 2])
    before = io.source_digest(tmp_path / "series")
    files = sorted((tmp_path / "series").iterdir())
    files[0].rename(tmp_path / "series" / "zzz.dcm")
    assert io.source_digest(tmp_path / "series") == before
    files[1].write_bytes(files[1].read_bytes() + b"\0")
    assert io.source_digest(tmp_path / "series") != before

    sitk.WriteImage(itk_image(), tmp_path / "scan.mhd")
    before = io.source_digest(tmp_path / "scan.mhd")
    raw = bytearray((tmp_path / "scan.raw").read_bytes())
    raw[5] ^= 1
    (tmp_path / "scan.raw").write_bytes(raw)
    assert io.source_digest(tmp_path / "scan.mhd") != before


@pytest.mark.data
def test_real_scans_as_nibabel_reads_them(real_data: Path) -> None:
    pairs = [
        (path, path.parents[1] / "label" / path.name.replace("img", "label"))
        for path in sorted((real_data / "liver" / "btcv" / "img").glob("*.nii.gz"))
    ]
    assert pairs
    for scan, label in pairs:
        volume = io.read_scan(scan)
        ras = nibabel.as_closest_canonical(nibabel.load(scan))
        np.testing.assert_array_equal(volume.hu, np.asarray(ras.dataobj)[::-1, ::-1])
        labels, warning = io.read_labels_on(volume.geometry, label)
        assert warning is None
        assert 20 < scale.check_hu(volume, checks.require_liver(labels, (6,), label), scan) < 150
