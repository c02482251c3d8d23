"""Reading and writing of volumes: orientation, geometry, exact round trips, memory."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from medad.base.errors import DiskFullError, InputError
from medad.ct import io, nifti
from medad.ct.dicom import write_dicom
from medad.ct.io import Geometry
from tests.medad.ct_series import save_slice

SHAPE = (5, 6, 7)
SPACING = (0.7, 0.9, 2.5)
ORIENTATIONS = [
    (axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
NAMES = [
    "".join("RAS"[a] if s > 0 else "LPI"[a] for a, s in zip(axes, signs, strict=True)) for axes, signs in ORIENTATIONS
]
HEADER_GEOMETRY = (
    *("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def tilt(degrees: float) -> NDArray[np.float64]:
    """Return a rotation about an oblique axis, by Rodrigues' formula."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.radians(degrees)
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation


def orientation_affine(axes: tuple[int, ...], signs: tuple[int, ...], degrees: float = 0.0) -> NDArray[np.float64]:
    """Return an affine in which source axis n runs along RAS axis axes[n], in the direction signs[n]."""
    affine = np.eye(4)
    columns = np.zeros((3, 3))
    for source, (ras, sign) in enumerate(zip(axes, signs, strict=True)):
        columns[ras, source] = sign * SPACING[source]
    affine[:3, :3] = tilt(degrees) @ columns
    affine[:3, 3] = (-31.7, 12.25, -804.5)
    return affine


def save(path: Path, array: NDArray[Any], affine: NDArray[np.float64], forms: str = "both") -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_qform(affine, code=1 if forms in ("both", "qform") else 0)
    image.header.set_sform(affine, code=2 if forms in ("both", "sform") else 0)
    nibabel.save(image, path)


def linear_index(shape: tuple[int, ...]) -> NDArray[np.int16]:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


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


def itk_image(axes: Any = (0, 1, 2), signs: Any = (1, 1, 1), degrees: float = 8.0) -> sitk.Image:
    affine = orientation_affine(axes, signs, degrees)
    image = sitk.GetImageFromArray(linear_index((4, 3, 5)))
    image.SetSpacing(SPACING)
    image.SetDirection((affine[:3, :3] / SPACING).ravel().tolist())  # this matrix is in LPS
    image.SetOrigin(affine[:3, 3].tolist())
    return image


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
    assert io.check_same_grid(volume.geometry, io.read_labels(tmp_path / "mask.nii.gz").geometry, tmp_path) is None


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "compressed"])
@pytest.mark.parametrize("name", ["scan.mhd", "scan.mha", "scan.nrrd", "scan.nhdr"])
def test_every_itk_format(tmp_path: Path, name: str, compress: bool) -> None:
    image = itk_image()
    sitk.WriteImage(image, tmp_path / name, compress)
    assert_on_itk_grid(io.read_scan(tmp_path / name), image)
    (tmp_path / name).rename(tmp_path / name.upper())
    assert_on_itk_grid(io.read_scan(tmp_path / name.upper()), image)


def write_slices(
    folder: Path, values: NDArray[np.int16], step: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Write a tilted CT series with slope 2 and intercept -1024, and with file names in shuffled order.

    `values` [slices, rows, columns] in HU must be even. Return origin, row step and column step in LPS mm.
    """
    folder.mkdir()
    row, column, _ = tilt(8).T
    origin = np.array([-100.5, 20.25, 300.0])
    shuffled = np.random.default_rng(0).permutation(len(values))
    for k, pixels in enumerate(values):
        save_slice(
            folder / f"{shuffled[k]:03d}.dcm",
            k,
            ((pixels.astype(np.int32) + 1024) // 2).astype(np.uint16),
            PixelSpacing=[0.9, 0.7],
            SliceThickness=3.0,
            ImageOrientationPatient=[f"{value:.10f}" for value in (*row, *column)],
            ImagePositionPatient=[f"{value:.8f}" for value in origin + k * step],
            RescaleSlope=2,
            RescaleIntercept=-1024,
        )
    return origin, row * 0.7, column * 0.9


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


@given(data=st.data())
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("round")
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    axes, signs = data.draw(st.sampled_from(ORIENTATIONS))
    affine = orientation_affine(axes, signs, data.draw(st.sampled_from([0.0, 3.0])))
    # float32 as in the header, so that the file has exactly this affine
    geometry = Geometry(shape, affine.astype(np.float32).astype(np.float64))
    size = geometry.canonical_shape
    hu = data.draw(hnp.arrays(np.float32, size, elements=st.floats(-4000, 4000, width=32)))
    probability = data.draw(hnp.arrays(np.float32, size, elements=st.floats(0, 1, width=32)))
    labels = data.draw(hnp.arrays(data.draw(st.sampled_from([np.uint8, np.int32])), size))
    mask = data.draw(hnp.arrays(np.bool_, size))
    layout = data.draw(st.sampled_from([np.ascontiguousarray, np.asfortranarray]))
    io.write_hu(folder / "hu.nii.gz", layout(hu), geometry)
    io.write_probability(folder / "probability.nii.gz", layout(probability), geometry)
    io.write_labels(folder / "labels.nii.gz", layout(labels), geometry)
    io.write_mask(folder / "mask.nii.gz", layout(mask), geometry)
    back = io.read_scan(folder / "hu.nii.gz")
    np.testing.assert_array_equal(back.hu, hu)
    np.testing.assert_array_equal(io.read_scan(folder / "probability.nii.gz").hu, probability)
    np.testing.assert_array_equal(io.read_labels(folder / "labels.nii.gz").values, labels)
    read_mask = io.read_labels(folder / "mask.nii.gz").values
    assert read_mask.dtype == np.uint8
    np.testing.assert_array_equal(read_mask, mask)
    assert back.geometry.affine.tobytes() == geometry.affine.tobytes()
    np.testing.assert_array_equal(geometry.to_canonical(geometry.to_source(hu)), hu)


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


def test_nothing_of_the_sources_text_is_carried_over(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(linear_index(SHAPE), np.diag([-1.0, -1.0, 1.0, 1.0]))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = b"SECRET"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"SECRET"))
    nibabel.save(image, tmp_path / "scan.nii.gz")
    volume = io.read_scan(tmp_path / "scan.nii.gz")
    io.write_mask(tmp_path / "mask.nii.gz", volume.hu > 3, volume.geometry)
    io.write_hu(tmp_path / "hu.nii.gz", volume.hu, volume.geometry)
    for name in ("mask", "hu"):
        packed = (tmp_path / f"{name}.nii.gz").read_bytes()
        assert b"SECRET" not in gzip.decompress(packed)
        assert len(gzip.decompress(packed)) == 352 + volume.hu.size * (1 if name == "mask" else 4)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    geometry = Geometry(SHAPE, np.diag([-1.0, -1.0, 1.0, 1.0]))
    mask = linear_index(SHAPE) % 2 == 0
    io.write_mask(tmp_path / "one.nii.gz", mask, geometry)
    os.utime(tmp_path / "one.nii.gz", (0, 0))
    io.write_mask(tmp_path / "another.nii.gz", np.asfortranarray(mask), geometry)
    packed = (tmp_path / "one.nii.gz").read_bytes()
    assert packed == (tmp_path / "another.nii.gz").read_bytes()
    # RFC 1952: flags (no name), then the time
    assert packed[3:8] == b"\0\0\0\0\0"


def test_gzip_in_members_and_padded_with_zeros(tmp_path: Path) -> None:
    save(tmp_path / "scan.nii", linear_index(SHAPE), np.diag([-1.0, -1.0, 1.0, 1.0]))
    raw = (tmp_path / "scan.nii").read_bytes()
    packed = gzip.compress(raw[:200]) + gzip.compress(raw[200:500]) + gzip.compress(raw[500:]) + b"\0" * 300_000
    (tmp_path / "scan.nii.gz").write_bytes(packed)
    np.testing.assert_array_equal(io.read_scan(tmp_path / "scan.nii.gz").hu, linear_index(SHAPE))


def geometry_of(affine: NDArray[np.float64], shape: tuple[int, int, int] = (64, 64, 30)) -> Geometry:
    return Geometry(shape, affine)


def test_rounding_is_no_mismatch_and_half_a_voxel_is() -> None:
    affine = orientation_affine((0, 1, 2), (-1, -1, 1), 8)
    label = Path("label.nii.gz")
    for noise in (1e-7, 1e-4):
        moved = affine * (1 + noise)
        assert io.check_same_grid(geometry_of(affine), geometry_of(moved), label) is None
    affine = orientation_affine((0, 1, 2), (-1, -1, 1))
    moved = affine.copy()
    moved[2, 3] += SPACING[2] / 2
    with pytest.raises(InputError, match=r"label\.nii\.gz: affine mismatch: .* 0\.5 voxels"):
        io.check_same_grid(geometry_of(affine), geometry_of(moved), label)
    warning = io.check_same_grid(geometry_of(affine), geometry_of(moved), label, affine_mismatch="warn")
    assert "affine mismatch" in str(warning)


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


def test_atomic_path_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "out.json"
    final.write_text("old", encoding="utf-8")

    def stop_half_way() -> None:
        with io.atomic_path(final) as temporary:
            temporary.write_text("half", encoding="utf-8")
            assert temporary.suffix == final.suffix
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert final.read_text(encoding="utf-8") == "old"
    with io.atomic_path(final) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert final.read_text(encoding="utf-8") == "old"
    assert final.read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_full_device_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_full_device(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            self.touch()
            return open("/dev/full", mode, *args, **kwargs)  # noqa: PTH123 (Path.open is what is replaced)
        return open(self, mode, *args, **kwargs)  # noqa: PTH123

    geometry = Geometry(SHAPE, np.diag([-1.0, -1.0, 1.0, 1.0]))
    monkeypatch.setattr(Path, "open", to_full_device)
    with pytest.raises(DiskFullError, match=r"mask\.nii\.gz: no room left") as caught:
        io.write_mask(tmp_path / "mask.nii.gz", linear_index(SHAPE) > 3, geometry)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_file_system(tmp_path: Path) -> None:
    """Write to a file system of 1 MB, in a namespace that ends with its process."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    script = f"""
import numpy as np, pathlib, sys
from medad.ct import io
from medad.base.errors import DiskFullError
folder = pathlib.Path({str(tmp_path)!r})
geometry = io.Geometry((128, 128, 64), np.diag([-1.0, -1.0, 1.0, 1.0]))
noise = np.random.default_rng(0).random((128, 128, 64), dtype=np.float32)
(folder / "old.nii.gz").write_bytes(b"old")
try:
    io.write_probability(folder / "old.nii.gz", noise, geometry)
except DiskFullError as error:
    print("FULL", [path.name for path in folder.iterdir()], (folder / "old.nii.gz").read_bytes() == b"old")
"""
    command = f'mount -t tmpfs -o size=1m none "{tmp_path}" || exit 77; exec "{sys.executable}" -c "$SCRIPT"'
    environment = os.environ | {"SCRIPT": script, "PYTHONPATH": str(Path(io.__file__).parents[2])}
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", command]
    done = subprocess.run(unshare, env=environment, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    assert done.stdout.strip() == "FULL ['old.nii.gz'] True", done.stderr


def test_silent_damage_while_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DamagesIt(nifti.GzipWriter):  # type: ignore[misc]
        def finish(self) -> None:
            super().finish()
            self._file.seek(-9, os.SEEK_END)
            self._file.write(b"\xff")

    monkeypatch.setattr(nifti, "GzipWriter", DamagesIt)
    geometry = Geometry(SHAPE, np.diag([-1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(OSError, match="read back"):
        io.write_mask(tmp_path / "mask.nii.gz", linear_index(SHAPE) > 3, geometry)
    assert list(tmp_path.iterdir()) == []


def test_memory_of_reading_and_writing_is_one_volume(tmp_path: Path) -> None:
    """Check that memory is 4 bytes per voxel and a few slabs, so that 512 x 512 x 1000 voxels need less than 1.9 GB."""
    shape = (512, 512, 160)
    deflate = zlib.compressobj(1, zlib.DEFLATED, 31)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    header.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with (tmp_path / "scan.nii.gz").open("wb") as file:
        file.write(deflate.compress(header.binaryblock + b"\0\0\0\0"))
        plane = np.arange(512 * 512, dtype=np.int16).tobytes()
        for _ in range(shape[2]):
            file.write(deflate.compress(plane))
        file.write(deflate.flush())
    script = """
import pathlib, resource, sys, numpy as np, SimpleITK
from medad.ct import io
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
volume = io.read_scan(pathlib.Path(sys.argv[1]) / "scan.nii.gz")
read = peak() - before
np.clip(volume.hu, 0, 1, out=volume.hu)
io.write_probability(pathlib.Path(sys.argv[1]) / "out.nii.gz", volume.hu, volume.geometry)
print(read / volume.hu.size, (peak() - before) / volume.hu.size)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(io.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    read, written = (float(value) for value in done.stdout.split())
    assert read < 5.5
    assert written < 6.5


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
        assert 20 < io.check_hu(volume, io.require_liver(labels, (6,), label), scan) < 150
