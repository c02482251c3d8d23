"""Bad input files: each raises a one-line InputError that names the file and the rule, and none gives wrong voxels."""

from __future__ import annotations

import contextlib
import functools
import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.ct import checks, io
from medad.ct.io import Geometry, Labels, Volume
from medad.ct.scale import check_hu
from tests.medad.ct_series import save_slice

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
SHAPE = (6, 5, 4)

# byte offsets in a NIfTI-1 header: https://nifti.nimh.nih.gov/nifti-1 (nifti1.h)
DIM, DATATYPE, PIXDIM, VOX_OFFSET, SCL_SLOPE, SCL_INTER, XYZT_UNITS = 40, 70, 76, 108, 112, 116, 123
QFORM_CODE, SFORM_CODE, QUATERN_B, SROW_X, MAGIC = 252, 254, 256, 280, 344


def values() -> NDArray[np.int16]:
    return np.arange(120, dtype=np.int16).reshape(SHAPE)


def refused(path: Path, match: str, read: Callable[[Path], Any] = io.read_scan, *, names: Path | None = None) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read(path)
    assert caught.value.path == (names or path)
    assert str(names or path) in str(caught.value)
    assert "\n" not in str(caught.value)


def save(path: Path, array: NDArray[Any], affine: NDArray[np.float64] = LPS) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nibabel.save(image, path)
    return path


def patched(folder: Path, *changes: tuple[int, str, Any], name: str = "scan.nii") -> Path:
    """Write a good file with some header fields overwritten: (offset, type, value)."""
    path = save(folder / "good.nii", values())
    content = bytearray(path.read_bytes())
    for offset, dtype, value in changes:
        raw = np.asarray(value, dtype=dtype).tobytes()
        content[offset : offset + len(raw)] = raw
    target = folder / name
    target.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return target


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    refused(tmp_path / "absent.nii.gz", "no such file")
    for name in ("empty.nii.gz", "empty.nii", "empty.mha", "empty.nrrd"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "empty")
    (tmp_path / "text.nii.gz").write_bytes(b"this is no image at all" * 40)
    refused(tmp_path / "text.nii.gz", "not a NIfTI file")
    (tmp_path / "text.nrrd").write_bytes(b"this is no image at all" * 40)
    refused(tmp_path / "text.nrrd", "not an NRRD file")
    (tmp_path / "text.mhd").write_bytes(b"this is no image at all" * 40)
    refused(tmp_path / "text.mhd", "header")
    (tmp_path / "scan.png").write_bytes(b"png")
    refused(tmp_path / "scan.png", "unknown format")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no DICOM file")
    refused(tmp_path / "folder", "a folder", io.read_labels)


@pytest.fixture(scope="module")
def packed() -> bytes:
    noise = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    image = nibabel.Nifti1Image(noise, LPS)
    image.set_qform(LPS, 1)
    return gzip.compress(image.to_bytes(), mtime=0)


def test_gzip_cut_anywhere_is_refused(tmp_path: Path, packed: bytes) -> None:
    path = tmp_path / "scan.nii.gz"
    for length in range(1, len(packed)):
        path.write_bytes(packed[:length])
        refused(path, "cut short|not a NIfTI")


def test_every_flipped_bit_is_refused_or_harmless(tmp_path: Path, packed: bytes) -> None:
    """Check that files with a flipped bit are refused or have equal voxels.

    Harmless bits are in gzip's time and system fields, or give another coding of the same bytes.
    """
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(packed)
    good = io.read_scan(path)
    passed = 0
    for bit in range(len(packed) * 8):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(InputError):
            read = io.read_scan(path)
            passed += 1
            np.testing.assert_array_equal(read.hu, good.hu)
            assert read.geometry == good.geometry
    assert passed < len(packed) * 8 / 20


def test_plain_file_cut_anywhere_is_refused(tmp_path: Path, packed: bytes) -> None:
    raw = gzip.decompress(packed)
    path = tmp_path / "scan.nii"
    for length in (*range(1, 360), *range(360, len(raw), 17)):
        path.write_bytes(raw[:length])
        refused(path, "cut short|not a NIfTI")


def test_garbage_after_the_gzip_stream_is_refused(tmp_path: Path, packed: bytes) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(packed + b"garbage")
    refused(tmp_path / "scan.nii.gz", "damaged")


def test_a_header_that_promises_the_moon_takes_no_memory(tmp_path: Path) -> None:
    for name in ("scan.nii", "scan.nii.gz"):
        path = patched(tmp_path, (DIM, "<i2", [3, 32767, 32767, 32767]), name=name)
        refused(path, "cut short")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ([(DIM, "<i2", [4, 6, 5, 2, 2])], "3 dimensions, found 4"),
        ([(DIM, "<i2", [5, 6, 5, 2, 1, 2])], "3 dimensions, found 5"),
        ([(DIM, "<i2", [2, 6, 20])], "3 dimensions, found 2"),
        ([(DIM, "<i2", [0, 6, 5, 4])], "sizes are invalid"),
        ([(DIM, "<i2", [3, 6, -5, 4])], "sizes are invalid"),
        ([(DIM, "<i2", [3, 6, 0, 4])], "sizes are invalid"),
        ([(PIXDIM + 4, "<f4", 0.0), (SFORM_CODE, "<i2", 0)], "voxel size must be above 0"),
        ([(PIXDIM + 8, "<f4", -1.0), (SFORM_CODE, "<i2", 0)], "voxel size must be above 0"),
        ([(PIXDIM + 12, "<f4", np.nan), (SFORM_CODE, "<i2", 0)], "voxel size must be above 0"),
        ([(PIXDIM + 12, "<f4", np.inf), (SFORM_CODE, "<i2", 0)], "voxel size must be above 0"),
        ([(SROW_X, "<f4", np.zeros(4))], "voxel size must be above 0"),
        ([(SROW_X, "<f4", [np.nan, 0, 0, 0]), (QFORM_CODE, "<i2", 0)], "NaN"),
        ([(QUATERN_B, "<f4", np.nan), (SFORM_CODE, "<i2", 0)], "NaN"),
        ([(SROW_X, "<f4", [-1.0, 0.1, 0, 0]), (QFORM_CODE, "<i2", 0)], "sheared"),
        ([(SROW_X, "<f4", [1.0, 0, 0, 0])], "sform and qform differ"),
        ([(SROW_X + 12, "<f4", 0.5)], "sform and qform differ by up to 0.5 voxels"),
        ([(QFORM_CODE, "<i2", 0), (PIXDIM + 4, "<f4", 1.5)], "by sform but .* by pixdim"),
        ([(QFORM_CODE, "<i2", [0, 0])], "no affine"),
        ([(QUATERN_B, "<f4", [2.0, 2.0, 2.0]), (SFORM_CODE, "<i2", 0)], "qform is not a rotation"),
        ([(SROW_X, "<f4", np.zeros(12)), (QFORM_CODE, "<i2", 0)], "all values of the sform are 0"),
        ([(SROW_X, "<f4", [-0.01, 0, 0, 0]), (QFORM_CODE, "<i2", 0)], "voxel size must be 0.05 to 25 mm"),
        ([(SROW_X + 20, "<f4", -50.0), (QFORM_CODE, "<i2", 0)], "voxel size must be 0.05 to 25 mm"),
        ([(XYZT_UNITS, "u1", 1)], "expected mm"),
        ([(XYZT_UNITS, "u1", 3)], "expected mm"),
        ([(SCL_SLOPE, "<f4", np.inf)], "wrong rescale slope"),
        ([(SCL_SLOPE, "<f4", [2.0, np.nan])], "wrong rescale slope"),
        ([(DATATYPE, "<i2", [128, 24])], "RGB"),
        ([(DATATYPE, "<i2", [32, 64])], "complex"),
        ([(DATATYPE, "<i2", [9999, 16])], "datatype"),
        ([(VOX_OFFSET, "<f4", np.nan)], "impossible start of the voxels"),
        ([(VOX_OFFSET, "<f4", 0.0)], "impossible start of the voxels"),
        ([(MAGIC, "S4", b"ni1")], "pair"),
        ([(MAGIC, "S4", b"xyz")], "magic"),
    ],
)
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_nifti_headers(tmp_path: Path, changes: list[tuple[int, str, Any]], rule: str, name: str) -> None:
    refused(patched(tmp_path, *changes, name=name), rule)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nrrd"])
def test_voxels_that_are_no_number(tmp_path: Path, bad: float, name: str) -> None:
    array = values().astype(np.float64)
    array[3, 2, 1] = bad
    if name.endswith("nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(array), tmp_path / name)
    else:
        save(tmp_path / name, array)
    refused(tmp_path / name, "NaN or infinite")
    refused(tmp_path / name, "NaN or infinite|beyond 32 bits", io.read_labels)


def test_labels_that_are_no_whole_numbers(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.nii.gz", values() + np.float32(0.25)), "whole numbers, found 0.25", io.read_labels)
    refused(save(tmp_path / "b.nii.gz", np.full(SHAPE, 3e9)), "beyond 32 bits", io.read_labels)


def test_label_of_another_shape_or_place(tmp_path: Path) -> None:
    scan = io.read_scan(save(tmp_path / "scan.nii.gz", values())).geometry
    large = save(tmp_path / "large.nii.gz", np.zeros((6, 5, 5), np.int16))
    shifted = LPS.copy()
    shifted[0, 3] = 7
    moved = save(tmp_path / "moved.nii.gz", values(), shifted)
    rule = "shape mismatch: the label has 6 x 5 x 5 voxels, the scan 6 x 5 x 4"
    refused(large, rule, functools.partial(io.read_labels_on, scan))
    refused(large, rule, functools.partial(io.read_labels_on, scan, affine_mismatch="warn"))
    refused(moved, "affine mismatch: .* 7 voxels", functools.partial(io.read_labels_on, scan))


def test_label_without_liver(tmp_path: Path) -> None:
    labels = io.read_labels(save(tmp_path / "label.nii.gz", (values() % 4).astype(np.uint8)))
    refused(
        tmp_path / "label.nii.gz",
        "label without liver: no voxel has value 6; values present: 0, 1, 2, 3$",
        lambda path: checks.require_liver(labels, (6,), path),
    )
    np.testing.assert_array_equal(
        checks.require_liver(labels, (1, 3), tmp_path), (labels.values == 1) | (labels.values == 3)
    )


def plausible(scale: float = 1.0, offset: float = 0.0) -> tuple[Volume, NDArray[np.bool_]]:
    """Return air, fat, and a liver of 100 +- 20 HU, scaled as by a wrong header."""
    rng = np.random.default_rng(0)
    hu = np.full((20, 20, 20), -1000.0)
    hu[3:17, 3:17] = -100
    liver = np.zeros(hu.shape, dtype=np.bool_)
    liver[5:12, 5:12, 5:12] = True
    hu[liver] = 100
    hu += rng.normal(0, 20, hu.shape)
    return Volume((hu * scale + offset).astype(np.float32), Geometry(hu.shape, LPS)), liver


@pytest.mark.parametrize(
    ("scale", "offset", "rule"),
    [
        (10.0, 0.0, "liver's median is"),
        (1.0, 1024.0, "liver's median is"),
        (1.0, -1024.0, "liver's median is"),
        (-1.0, 0.0, "liver's median is"),
        (0.02, 0.0, "values are from"),
        (40.0, 0.0, "values are from"),
        (1e-4, 0.0, "values are from"),
    ],
)
def test_wrong_rescale_slope(scale: float, offset: float, rule: str) -> None:
    volume, liver = plausible()
    assert 95 < check_hu(volume, liver, Path("scan.nii.gz")) < 105
    volume, liver = plausible(scale, offset)
    refused(Path("scan.nii.gz"), f"not plausible HU.*{rule}", lambda path: check_hu(volume, liver, path))


def test_liver_without_any_noise_is_no_ct() -> None:
    volume, liver = plausible()
    volume.hu[liver] = 80
    refused(
        Path("s.nii.gz"),
        "80 % of the liver's values lie within 0 HU",
        lambda path: check_hu(volume, liver, path),
    )


def test_itk_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (12, 16, 16)).astype(np.int16)
    image = sitk.GetImageFromArray(noise)
    for name, data in (("a.mha", "a.mha"), ("b.mhd", "b.zraw"), ("c.nrrd", "c.nrrd"), ("d.nhdr", "d.raw.gz")):
        sitk.WriteImage(image, tmp_path / name, True)
        good = (tmp_path / data).read_bytes()
        (tmp_path / data).write_bytes(good[: len(good) * 2 // 3])
        refused(tmp_path / name, "cut short")
        for position in range(len(good) // 2, len(good), 131):
            flipped = bytearray(good)
            flipped[position] ^= 0x10
            (tmp_path / data).write_bytes(flipped)
            refused(tmp_path / name, "damaged|cut short")
        if data != name:
            (tmp_path / data).unlink()
            refused(tmp_path / name, "missing")
    for name in ("raw.mha", "raw.nrrd"):
        sitk.WriteImage(image, tmp_path / name, False)
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(good[: len(good) * 2 // 3])
        refused(tmp_path / name, "cut short")


@pytest.mark.parametrize(
    ("name", "old", "new", "rule"),
    [
        ("scan.mha", b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 0 1", "voxel size"),
        ("scan.mha", b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 1 -2", "voxel size"),
        ("scan.mha", b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 1e 1", "voxel size is not numbers"),
        ("scan.mha", b"ElementSpacing = 1 1 1\n", b"", "no affine"),
        ("scan.mha", b"ElementDataFile = LOCAL", b"ElementDataFile = LO\x00AL", "must be in one file"),
        ("scan.mha", b"ElementDataFile = LOCAL", b"ElementDataFile = ../../other.raw", "in the header's folder"),
        ("scan.mha", b"1 0 0 0 1 0 0 0 1", b"1 0.2 0 0 1 0 0 0 1", "sheared|header"),
        ("scan.nrrd", b"space directions: (1,0,0) (0,1,0) (0,0,1)\n", b"", "no affine"),
        ("scan.nrrd", b"(1,0,0) (0,1,0) (0,0,1)", b"(1,0,0) (0,0,0) (0,0,1)", "voxel size|header|sheared"),
        ("scan.nrrd", b"(1,0,0) (0,1,0) (0,0,1)", b"(1,0,0) (0.3,1,0) (0,0,1)", "sheared|header"),
        ("scan.nrrd", b"encoding: raw", b"encoding: wax", "header"),
    ],
)
def test_itk_headers(tmp_path: Path, name: str, old: bytes, new: bytes, rule: str) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(values()), tmp_path / name, False)
    good = (tmp_path / name).read_bytes()
    assert old in good
    (tmp_path / name).write_bytes(good.replace(old, new))
    refused(tmp_path / name, rule)


def test_itk_images_of_other_kinds(tmp_path: Path) -> None:
    colour = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    sitk.WriteImage(colour, tmp_path / "colour.mha")
    refused(tmp_path / "colour.mha", "several values")
    moving = sitk.GetImageFromArray(np.zeros((2, 4, 5, 6), np.int16), isVector=False)
    sitk.WriteImage(moving, tmp_path / "moving.nrrd")
    refused(tmp_path / "moving.nrrd", "3 dimensions, found 4|no affine")
    flat = sitk.GetImageFromArray(np.zeros((5, 6), np.int16))
    sitk.WriteImage(flat, tmp_path / "flat.mha")
    refused(tmp_path / "flat.mha", "3 dimensions, found 2")


def write_series(
    folder: Path, change: dict[int, dict[str, Any]], *, skip: tuple[int, ...] = (), tilt: float = 0
) -> None:
    """Write six good CT slices with 2 mm spacing. `change` overwrites tags of some slices."""
    folder.mkdir()
    for k in set(range(6)) - set(skip):
        tags: dict[str, Any] = {
            "PixelSpacing": [1, 1],
            "SliceThickness": 2,
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
        }
        place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, tilt * k, 2 * k]}
        stored = np.arange(20, dtype=np.int16).reshape(4, 5)
        save_slice(folder / f"{k}.dcm", k, stored, **(tags | place | change.get(k, {})))


@pytest.mark.parametrize(
    ("change", "where", "rule"),
    [
        (
            {5: {"SeriesInstanceUID": "2.25.4444"}},
            "",
            r"mixed series: 2 CT series \((1 \+ 5|5 \+ 1) slices\)",
        ),
        ({3: {"Rows": 5, "Columns": 4}}, "", "mixed series: slices of .* pixels"),
        ({3: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}}, "", "mixed series: .* orientation"),
        ({3: {"PixelSpacing": [2, 2]}}, "", "mixed series: .* pixel spacing"),
        ({3: {"ImagePositionPatient": [0, 0, 4]}}, "", "missing slice: 4 mm"),
        ({5: {"ImagePositionPatient": [0, 0, 10.5]}}, "", "uneven slice spacing"),
        ({2: {"ImagePositionPatient": [1, 0, 4]}}, "", "uneven slice spacing"),
        ({0: {"RescaleSlope": 0}}, "0.dcm", "wrong rescale slope"),
        ({0: {"RescaleSlope": -1}}, "0.dcm", "wrong rescale slope"),
        ({0: {"RescaleSlope": None}}, "0.dcm", "RescaleSlope"),
        ({0: {"RescaleIntercept": None}}, "0.dcm", "RescaleIntercept"),
        ({0: {"Modality": "MR"}}, "0.dcm", "expected modality CT, found MR"),
        ({0: {"Modality": "SECRET"}}, "0.dcm", "expected modality CT$"),
        ({0: {"PixelSpacing": [0, 1]}}, "0.dcm", "voxel size|readable"),
        ({0: {"PixelSpacing": None}}, "0.dcm", "PixelSpacing"),
        ({0: {"ImagePositionPatient": None}}, "0.dcm", "ImagePositionPatient"),
        ({0: {"ImageOrientationPatient": None}}, "0.dcm", "ImageOrientationPatient"),
        ({0: {"PixelData": b"\0" * 10}}, "0.dcm", "decoded"),
        ({0: {"NumberOfFrames": 2, "PixelData": b"\0" * 80}}, "0.dcm", "multi-frame"),
    ],
)
def test_dicom_series(tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, where: str, rule: str) -> None:
    write_series(tmp_path / "series", change)
    refused(tmp_path / "series", rule, names=tmp_path / "series" / where)
    with pytest.raises(InputError) as caught:
        io.read_scan(tmp_path / "series")
    printed = capfd.readouterr()
    assert "SECRET" not in str(caught.value) + printed.out + printed.err
    assert "2.25." not in str(caught.value) + printed.out + printed.err
    assert caught.value.__cause__ is None


def test_dicom_missing_slice_tilted_gantry_and_strangers(tmp_path: Path) -> None:
    write_series(tmp_path / "good", {})
    assert io.read_scan(tmp_path / "good").hu.shape == (5, 4, 6)
    write_series(tmp_path / "gap", {}, skip=(2,))
    refused(tmp_path / "gap", "missing slice: 4 mm between slices 2 and 3 of 5, elsewhere 2 mm")
    write_series(tmp_path / "tilted", {}, tilt=0.5)
    refused(tmp_path / "tilted", "sheared")
    write_series(tmp_path / "stranger", {})
    (tmp_path / "stranger" / "7.dcm").write_bytes(b"this is no DICOM file" * 30)
    refused(tmp_path / "stranger", "not a readable DICOM", names=tmp_path / "stranger" / "7.dcm")
    (tmp_path / "stranger" / "7.dcm").write_bytes(b"")
    refused(tmp_path / "stranger", "empty", names=tmp_path / "stranger" / "7.dcm")
    np.testing.assert_array_equal(io.read_scan(tmp_path / "good" / "0.dcm").hu, io.read_scan(tmp_path / "good").hu)


def test_dicom_file_cut_short(tmp_path: Path) -> None:
    write_series(tmp_path / "series", {})
    path = tmp_path / "series" / "3.dcm"
    good = path.read_bytes()
    for length in range(1, len(good), 13):
        path.write_bytes(good[:length])
        refused(tmp_path / "series", "DICOM", names=path)


def test_unreadable_file_names_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "scan.nii.gz", values())

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    refused(path, r"cannot be read \(Permission denied\)")
    refused(path, "cannot be read", io.source_digest)


def test_labels_hold_what_the_file_held(tmp_path: Path) -> None:
    """Check the reader's damage check from outside: a wrong CRC is enough."""
    content = bytearray(gzip.compress(save(tmp_path / "good.nii", values()).read_bytes()))
    assert zlib.crc32((tmp_path / "good.nii").read_bytes()) == int.from_bytes(content[-8:-4], "little")
    content[-8] ^= 1
    (tmp_path / "label.nii.gz").write_bytes(content)
    refused(tmp_path / "label.nii.gz", "damaged .*incorrect data check", io.read_labels)
    assert isinstance(io.read_labels(tmp_path / "good.nii"), Labels)
