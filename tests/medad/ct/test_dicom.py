"""CT in DICOM as archives export it: what lies beside the slices, which series it is, and what its values mean."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medad.base.errors import InputError
from medad.ct import dicom_files, io
from medad.ct.dicom_choice import SeveralSeriesError, choose_series, select_series, series_path
from medad.ct.dicom_series import find_series
from tests.medad.ct_series import save_slice

COLUMNS, ROWS, PLANES = 5, 4, 12
SPACING_MM = (0.75, 0.5, 2.5)
"""Along columns, rows and slices."""
ORIGIN = (-20.0, 30.0, -100.0)
SPINE = {
    "SliceThickness": SPACING_MM[2],
    "PixelSpacing": [SPACING_MM[1], SPACING_MM[0]],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "RescaleSlope": 1,
    "RescaleIntercept": -1024,
    "RescaleType": "HU",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "SeriesNumber": 3,
}
Change = Callable[[int], dict[str, Any]]


def hu() -> NDArray[np.int16]:
    """Return known HU, planes x rows x columns."""
    rng = np.random.default_rng(7)
    return rng.integers(-1000, 1500, (PLANES, ROWS, COLUMNS)).astype(np.int16)


def write(folder: Path, change: Change = lambda k: {}, *, values: Any = None, first: int = 0, lift: float = 0) -> Path:
    """Write a series. `change` overwrites tags of slice k."""
    folder.mkdir(parents=True, exist_ok=True)
    values = hu() if values is None else values
    for k, plane in enumerate(values):
        place = {
            "ImagePositionPatient": [ORIGIN[0], ORIGIN[1], ORIGIN[2] + lift + k * SPACING_MM[2]],
            "InstanceNumber": first + k + 1,
        }
        save_slice(folder / f"IM{first + k:04d}", first + k, plane + np.int16(1024), **(SPINE | place | change(k)))
    return folder


def check(path: Path, *notes: str, values: Any = None) -> None:
    """Check that a path gives the known HU, the grid, and these notes."""
    volume = io.read_scan(path)
    expected = (hu() if values is None else values).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.hu, expected)
    np.testing.assert_allclose(volume.geometry.canonical_spacing_mm, SPACING_MM)
    np.testing.assert_allclose(volume.geometry.canonical_affine[:3, 3], [-ORIGIN[0], -ORIGIN[1], ORIGIN[2]])
    assert len(volume.notes) == len(notes), volume.notes
    for note, found in zip(notes, volume.notes, strict=True):
        assert re.search(note, found), found


def refused(path: Path, rule: str) -> InputError:
    """Check that a path gives this rule, without any text of the header."""
    with pytest.raises(InputError, match=rule) as caught:
        io.read_scan(path)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def series(tmp_path: Path) -> Path:
    return write(tmp_path / "scan")


def other_object(path: Path, modality: str, sop_class: str, **tags: Any) -> None:
    save_slice(
        path,
        900,
        np.zeros((4, 4), np.int16),
        Modality=modality,
        SOPClassUID=sop_class,
        SeriesInstanceUID="2.25.9",
        **tags,
    )


RT_STRUCTURES, SCREEN, REPORT = "1.2.840.10008.5.1.4.1.1.481.3", pydicom.uid.SecondaryCaptureImageStorage, "SR"


def test_what_lies_beside_the_slices_is_counted_and_does_not_count(series: Path) -> None:
    digest = io.source_digest(series)
    other_object(series / "RS.dcm", "RTSTRUCT", RT_STRUCTURES, PixelData=None, Rows=None, Columns=None)
    other_object(series / "dose", "CT", SCREEN)
    other_object(series / "SC1.dcm", "OT", SCREEN)
    other_object(
        series / "IM9999",
        "CT",
        pydicom.uid.CTImageStorage,
        **(SPINE | {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
    )
    for name in ("report.pdf", "key.jpg", "Thumbs.db", "README", "2_Abdomen.nii.gz", "labels.json"):
        (series / name).write_bytes(b"anything")
    (series / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (series / "sub").mkdir()
    (series / "sub" / "notes").write_text("no slice", encoding="utf-8")
    (series / ".DS_Store").write_bytes(b"hidden")
    check(
        series,
        "passed over: 1 .jpg, 1 .json, 1 .pdf, 1 NIfTI, 1 OT image, 1 RT structure set, 1 file that is not DICOM, "
        "3 index or note, 1 localizer, 1 screen save or report",
    )
    assert io.source_digest(series) == digest


@pytest.mark.parametrize("where", ["nested", "zip", "DICOMDIR", "one file", "bytes", "links"])
def test_every_shape_of_an_export_is_the_same_scan(tmp_path: Path, series: Path, where: str) -> None:
    digest = io.source_digest(series)
    if where == "nested":
        path = tmp_path / "cd"
        shutil.move(series, path / "DICOM" / "ST01" / "SE01")
    elif where == "zip":
        path = tmp_path / "cd.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in series.iterdir():
                archive.write(file, f"DICOM/{file.name}")
    elif where == "DICOMDIR":
        path = series / "DICOMDIR"
        path.write_bytes(b"\0" * 128 + b"DICM")
    elif where == "one file":
        path = series / "IM0003"
    elif where == "bytes":
        path = tmp_path / os.fsdecode(b"M\xfcller")
        series.rename(path)
        for file in list(path.iterdir()):
            file.rename(path / os.fsdecode(b"\xe4" + os.fsencode(file.name)))
    else:
        path = tmp_path / "links"
        path.mkdir()
        for file in series.iterdir():
            (path / file.name).symlink_to(file)
    check(path, *(["1 index or note"] if where == "DICOMDIR" else []))
    assert io.source_digest(path) == digest


def test_a_slice_that_cannot_be_read_is_never_left_out(tmp_path: Path) -> None:
    """At the end of a series nothing else would show that it is missing."""
    last = f"IM{PLANES - 1:04d}"
    for content, rule in (
        (b"", "empty"),
        (b"\0" * 5000, "not a readable DICOM"),
        (b"x" * 5000, "not a readable DICOM"),
    ):
        folder = write(tmp_path / f"{rule}{content[:1]!r}")
        (folder / last).write_bytes(content)
        assert refused(folder, rule).path == folder / last
    broken = write(tmp_path / "broken")
    for name in (last, f"IM{PLANES - 2:04d}"):
        (broken / name).unlink()
        (broken / name).symlink_to("/nowhere/annex")
    refused(broken, "2 links lead nowhere")
    foreign = write(tmp_path / "foreign", lambda k: {"Modality": "MR"} if k == PLANES - 1 else {})
    assert refused(foreign, "expected modality CT, found MR").path == foreign / last


def test_a_file_header_with_a_type_that_is_not_dicoms_is_not_needed(series: Path) -> None:
    file = series / "IM0002"
    content = file.read_bytes()
    assert content.count(b"\x02\x00\x02\x00UI") == 1
    file.write_bytes(content.replace(b"\x02\x00\x02\x00UI", b"\x02\x00\x02\x00U\x00"))
    check(series)


def test_the_same_file_twice_counts_once(series: Path) -> None:
    shutil.copy(series / "IM0004", series / "copy of IM0004")
    check(series, "occur twice with equal pixels were passed over: 1")


def test_several_series_need_a_choice(tmp_path: Path, series: Path) -> None:
    later = hu() + np.int16(40)
    more = {
        "SeriesInstanceUID": "2.25.5",
        "SeriesNumber": 4,
        "SeriesDescription": "SECRET portal",
        "ConvolutionKernel": "B30",
    }
    write(series, lambda k: more, values=later, first=100)
    error = refused(series, r"mixed series: 2 CT series \(12 \+ 12 slices\); choose one with --series")
    assert isinstance(error, SeveralSeriesError)
    arterial, portal = error.series
    assert [each.number for each in error.series] == ["3", "4"]
    assert portal.row["description"] == "SECRET portal"
    check(series_path(series, arterial))
    check(series_path(series, portal), values=later)
    assert io.source_digest(series_path(series, arterial)) == io.source_digest(write(tmp_path / "alone"))
    assert select_series(series, "4") == series_path(series, portal)
    assert select_series(series, portal.key) == series_path(series, portal)
    by_rule = select_series(series, rules=[lambda each: "portal" in each.description])
    assert by_rule == series_path(series, portal)
    with pytest.raises(SeveralSeriesError, match="no CT series has the number"):
        select_series(series, "9")
    with pytest.raises(SeveralSeriesError, match="none of 2 CT series"):
        select_series(series, rules=[lambda _: False])
    refused(series / "series-00000000", "no such series")
    check(series / "IM0000")  # one file stands for its series


def test_a_series_of_few_images_is_no_choice(series: Path) -> None:
    scout = {"SeriesInstanceUID": "2.25.6", "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
    write(series, lambda k: scout, values=hu()[:2], first=100)
    check(series, "2 single image")


@pytest.mark.parametrize(
    ("tags", "lift"),
    [
        ({"AcquisitionNumber": 2}, 0.0),
        ({"TemporalPositionIdentifier": 2}, 0.0),
        ({"AcquisitionNumber": 2}, SPACING_MM[2] / 2),
        ({}, SPACING_MM[2] / 2),  # told apart by the order of the image numbers
        ({}, 0.0),
    ],
)
def test_two_phases_in_one_series(tmp_path: Path, tags: dict[str, Any], lift: float) -> None:
    numbers = dict.fromkeys(tags, 1)
    folder = write(tmp_path / "scan", lambda k: numbers)
    later = hu() + np.int16(25)
    write(folder, lambda k: tags, values=later, first=100, lift=lift)
    error = refused(folder, r"two phases in one series \(12 \+ 12 slices\)")
    assert isinstance(error, SeveralSeriesError)
    first, second = error.series
    assert [first.phase, second.phase] == ["1", "2"]
    check(series_path(folder, first))
    found = io.read_scan(series_path(folder, second))
    np.testing.assert_array_equal(found.hu, later.transpose(2, 1, 0))
    assert found.geometry.affine[2, 3] == ORIGIN[2] + lift


def test_an_examination_in_two_parts_is_one_volume(tmp_path: Path) -> None:
    """A scanner may number the upper and the lower part as two acquisitions."""
    check(write(tmp_path / "scan", lambda k: {"AcquisitionNumber": 1 + k // 6, "InstanceNumber": PLANES - k}))


def test_two_patients_in_one_series(tmp_path: Path) -> None:
    refused(write(tmp_path / "id", lambda k: {"PatientID": "SECRET2"} if k > 8 else {}), "two patients in one series")
    named = write(tmp_path / "name", lambda k: {"PatientName": "SECRET^Other"} if k > 8 else {})
    refused(named, "two patients in one series")
    refused(
        write(tmp_path / "s", lambda k: {"StudyInstanceUID": "2.25.8"} if k > 8 else {}), "two studies in one series"
    )
    check(write(tmp_path / "written", lambda k: {"PatientName": "SECRETNAME^X" if k % 2 else "Secretname X"}))
    other = {"SeriesInstanceUID": "2.25.5", "PatientID": "SECRET2"}
    write(tmp_path / "written", lambda k: other, values=hu()[:5], first=100)
    refused(
        tmp_path / "written", r"2 CT series of two patients \(5 \+ 12 slices\)|2 CT series of two patients \(12 \+ 5"
    )


# --- what the values mean


def test_monochrome1_does_not_turn_hu_round(tmp_path: Path) -> None:
    check(write(tmp_path / "plain", lambda k: {"PhotometricInterpretation": "MONOCHROME1"}))
    compressed(tmp_path / "rle", pydicom.uid.RLELossless, PhotometricInterpretation="MONOCHROME1")
    check(tmp_path / "rle")


def compressed(folder: Path, syntax: str, **tags: Any) -> None:
    """Write the series with run-length encoded pixels: signed, 12 bits. Then state another syntax."""
    write(folder)
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        stored = data.pixel_array.astype(np.int16) - np.int16(1024)
        data.RescaleIntercept, data.PixelRepresentation = 0, 1
        data.BitsStored, data.HighBit = 12, 11
        data.PixelData = stored.tobytes()
        data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        data.file_meta.TransferSyntaxUID = syntax
        for name, value in tags.items():
            setattr(data, name, value)
        data.save_as(file, enforce_file_format=True)


def test_a_transfer_syntax_that_is_not_known_is_named(tmp_path: Path) -> None:
    compressed(tmp_path / "htj2k", "1.2.840.10008.1.2.4.201")
    refused(tmp_path / "htj2k", r"High-Throughput JPEG 2000.*1\.2\.840\.10008\.1\.2\.4\.201.*decompress")


def test_scales_of_each_slice_and_none_at_all(tmp_path: Path) -> None:
    scales = [(1, -1024), (2, -2048), (0.5, -512)]

    def change(k: int) -> dict[str, Any]:
        slope, intercept = scales[k % 3]
        return {"RescaleSlope": slope, "RescaleIntercept": intercept}

    scaled = np.stack([(plane + 1024.0) * scales[k % 3][0] + scales[k % 3][1] for k, plane in enumerate(hu())])
    check(write(tmp_path / "each", change), values=scaled.astype(np.float32))
    none = write(tmp_path / "none", lambda k: {"RescaleSlope": None, "RescaleIntercept": None})
    check(none, "no RescaleSlope; their values were taken as HU", values=hu() + 1024)
    refused(
        write(tmp_path / "some", lambda k: {"RescaleSlope": None, "RescaleIntercept": None} if k else {}),
        "RescaleSlope",
    )
    check(write(tmp_path / "us", lambda k: {"RescaleType": "US"}), "RescaleType is not HU")
    refused(write(tmp_path / "iodine", lambda k: {"RescaleType": "MGML"}), "not HU: RescaleType is MGML")


def test_bits_above_those_stored(tmp_path: Path) -> None:
    def overlay(k: int) -> dict[str, Any]:
        stored = (hu()[k].astype(int) + 1024).astype("<u2")
        return {
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
            "PixelData": (stored | np.uint16(1 << 13)).tobytes(),
        }

    check(write(tmp_path / "overlay", overlay))

    def wrong(k: int) -> dict[str, Any]:
        stored = (hu()[k].astype(int) + 8192).astype("<u2")
        header = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "RescaleIntercept": -8192}
        return header | {"PixelData": stored.tobytes()}

    check(write(tmp_path / "wrong", wrong), "more than the 12 bits of the header")


def test_padding_far_above_hu_is_air(tmp_path: Path) -> None:
    padded = hu().astype(np.int32)
    padded[:, 0, 0] = 31743  # stored 32767
    folder = write(tmp_path / "padded", lambda k: {"PixelPaddingValue": 32767}, values=padded.astype(np.int16))
    expected = hu().copy()
    expected[:, 0, 0] = -1024
    check(folder, "padding was taken as air", values=expected)


# --- where the slices are


def test_rounded_positions_and_gaps(tmp_path: Path) -> None:
    step = 0.625

    def rounded(k: int) -> dict[str, Any]:
        return {"ImagePositionPatient": [-20, 30, round(-100 + step * k, 1)], "SliceThickness": step}

    volume = io.read_scan(write(tmp_path / "rounded", rounded))
    assert volume.geometry.canonical_spacing_mm[2] == pytest.approx(step)
    assert volume.geometry.canonical_affine[2, 3] == pytest.approx(-100, abs=0.05)
    assert "rounded to 0.1 mm" in volume.notes[0]
    check(write(tmp_path / "zero", lambda k: {"SpacingBetweenSlices": 0}))
    uneven = write(tmp_path / "uneven", lambda k: {"ImagePositionPatient": [-20, 30, -100 + 2.5 * k + (k > 5) * 0.4]})
    refused(uneven, "uneven slice spacing")


def test_a_gantry_tilt_is_named(tmp_path: Path) -> None:
    angle = np.radians(13.5)
    tilt = {"ImageOrientationPatient": [1, 0, 0, 0, float(np.cos(angle)), float(-np.sin(angle))]}
    refused(write(tmp_path / "scan", lambda k: tilt), "gantry tilt of 13.5 degrees")


def enhanced(path: Path, *, temporal: bool = False) -> None:
    """Write a multi-frame CT with its frames in reverse order."""
    values = hu()[::-1]
    save_slice(path, 0, np.zeros((ROWS, COLUMNS), np.int16), SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", SeriesNumber=3)
    data = pydicom.dcmread(path)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.NumberOfFrames = PLANES
    data.PixelData = (values + np.int16(1024)).astype("<i2").tobytes()
    measures, orientation, scale, shared = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = SPINE["PixelSpacing"], SPACING_MM[2]
    orientation.ImageOrientationPatient = SPINE["ImageOrientationPatient"]
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 1, -1024, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.PixelValueTransformationSequence = [scale]
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in range(PLANES):
        place, content, frame = Dataset(), Dataset(), Dataset()
        level = PLANES - 1 - k if not temporal else (PLANES - 1 - k) % (PLANES // 2)
        place.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING_MM[2] * level]
        content.TemporalPositionIndex = 1 + k // (PLANES // 2) if temporal else 1
        frame.PlanePositionSequence, frame.FrameContentSequence = [place], [content]
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = frames
    data.save_as(path, enforce_file_format=True)


def test_a_multi_frame_ct(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    enhanced(tmp_path / "scan" / "one.dcm")
    check(tmp_path / "scan")
    check(tmp_path / "scan" / "one.dcm")
    (tmp_path / "phases").mkdir()
    enhanced(tmp_path / "phases" / "one.dcm", temporal=True)
    refused(tmp_path / "phases", r"two phases in one series \(6 \+ 6 slices\)")


# --- zips


def zipped(path: Path, *members: tuple[str, bytes], link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if link:
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content)
    return path


def test_unsafe_zips_are_refused_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slice_file = (write(tmp_path / "scan") / "IM0000").read_bytes()
    for name in ("../evil", "a/../../evil", "/etc/evil", "..\\evil", "C:\\evil"):
        refused(zipped(tmp_path / "a.zip", (name, slice_file)), "unsafe: the name of a file leads out of it")
    refused(zipped(tmp_path / "b.zip", ("link", b"/etc/passwd"), link=True), "unsafe: it has links")
    refused(zipped(tmp_path / "c.zip", ("zeros", bytes(64 << 20))), "a bomb")
    monkeypatch.setattr(dicom_files, "MAX_FILES", 100)
    refused(zipped(tmp_path / "d.zip", *((f"{n}", b"x") for n in range(101))), "more than 100 files")
    (tmp_path / "e.zip").write_bytes((tmp_path / "b.zip").read_bytes()[:-30])
    refused(tmp_path / "e.zip", "damaged")
    (tmp_path / "f.zip").write_bytes(b"no zip")
    refused(tmp_path / "f.zip", "damaged")
    refused(zipped(tmp_path / "g.zip", ("a.nii.gz", b"x")), "holds NIfTI files and no DICOM")
    whole = zipped(tmp_path / "h.zip", *((file.name, file.read_bytes()) for file in (tmp_path / "scan").iterdir()))
    cut = bytearray(whole.read_bytes())
    cut[2000] ^= 0xFF
    (tmp_path / "i.zip").write_bytes(cut)
    refused(tmp_path / "i.zip", "zip is damaged")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["scan"]


def test_folders_without_a_ct(tmp_path: Path) -> None:
    (tmp_path / "nifti").mkdir()
    (tmp_path / "nifti" / "scan.nii.gz").write_bytes(b"x")
    refused(tmp_path / "nifti", "holds NIfTI files and no DICOM")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no DICOM file in this folder")
    (tmp_path / "structures").mkdir()
    other_object(tmp_path / "structures" / "RS", "RTSTRUCT", RT_STRUCTURES, PixelData=None, Rows=None, Columns=None)
    refused(tmp_path / "structures", "expected modality CT, found RTSTRUCT|no CT series")
    os.mkfifo(tmp_path / "pipe.dcm")
    refused(tmp_path / "pipe.dcm", "unknown format|no such file")
    series = write(tmp_path / "scan")
    os.mkfifo(series / "pipe.dcm")
    check(series)


def test_every_file_is_read_whole_at_most_once_besides_its_digest(
    series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[str] = []
    read = dicom_files.read_whole

    def counted(file: dicom_files.DicomFile) -> dicom_files.Header:
        whole.append(file.name)
        return read(file)

    monkeypatch.setattr("medad.ct.dicom.read_whole", counted)
    io.read_scan(series)
    assert sorted(whole) == sorted(path.name for path in series.iterdir())


def test_a_series_has_one_key_in_all_places(tmp_path: Path, series: Path) -> None:
    [found] = find_series(series).series
    assert choose_series(series)[0].key == found.key == find_series(write(tmp_path / "again")).series[0].key
