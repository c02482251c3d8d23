"""DICOM results against masks that are known before, read back with pydicom, highdicom and SimpleITK."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement

from medad.base.errors import InputError
from medad.ct.io import read_scan, write_mask
from medad.dicom_out import objects
from medad.dicom_out.results import write_dicom_results
from medad.dicom_out.source import source_series
from medad.evaluation.postprocess import lesion_table
from tests.medad.ct_series import save_slice
from tests.medad.ct_volumes import tilt

MADE = datetime(2024, 2, 3, 4, 5, 6)
SHAPE = (8, 12, 16)  # planes, rows, columns
ORIENTATIONS = {
    "axial": ((1, 0, 0), (0, 1, 0), 1),
    "axial descending": ((1, 0, 0), (0, 1, 0), -1),
    "coronal": ((1, 0, 0), (0, 0, -1), 1),
    "sagittal": ((0, 1, 0), (0, 0, -1), 1),
    "prone": ((-1, 0, 0), (0, -1, 0), 1),
    "feet first": ((-1, 0, 0), (0, 1, 0), -1),
    "oblique": (tuple(tilt(8)[0]), tuple(tilt(8)[1]), 1),
}


def write_series(folder: Path, row: Any, column: Any, sign: int, planes: int = SHAPE[0]) -> Path:
    folder.mkdir()
    row, column = np.array(row, float), np.array(column, float)
    step = np.cross(row, column) * 2.5 * sign
    for k in range(planes):
        position = np.array([-31.5, 12.25, -804.5]) + k * step
        tags = {
            "PixelSpacing": [0.9, 0.7],
            "SliceThickness": 2.5,
            "ImageOrientationPatient": [f"{value:.10f}" for value in (*row, *column)],
            "ImagePositionPatient": [f"{value:.8f}" for value in position],
            "RescaleSlope": 1,
            "RescaleIntercept": 0,
            "FrameOfReferenceUID": "2.25.99",
            "SeriesNumber": 3,
            "SpacingBetweenSlices": -2.5,
            "StudyDate": "20240101",
            "StudyTime": "101500",
            "StudyID": "7",
            "PatientBirthDate": "19500101",
            "PatientSex": "F",
        }
        save_slice(folder / f"{k:03d}.dcm", k, np.full(SHAPE[1:], 50, np.int16), **tags)
    return folder


def write_case(scan: Path, case: Path, lesions: NDArray[np.bool_], liver: NDArray[np.bool_]) -> Path:
    """Write the files of a segmented case. Masks are given as planes, rows, columns along the ascending normal."""
    geometry = source_series(scan).geometry
    mask, organ = (geometry.to_canonical(each.transpose(2, 1, 0)) for each in (lesions, liver))
    (case / "liver_masks").mkdir(parents=True)
    write_mask(case / "mask.nii.gz", mask, geometry)
    write_mask(case / "liver_masks" / "case.nii.gz", organ, geometry)
    hu = np.full(np.count_nonzero(mask), 37.5, np.float16)
    found = lesion_table(mask, mask.astype(np.float32), geometry.canonical_affine, hu)
    table = {
        "threshold": 0.31,
        "liver_ml": np.count_nonzero(organ) * geometry.voxel_mm3 / 1000,
        "lesion_count": len(found),
        "lesion_ml": sum(each.volume_mm3 for each in found) / 1000,
        "lesions": [asdict(each) for each in found],
    }
    (case / "lesions.json").write_text(json.dumps(table), encoding="utf-8")
    return case


def masks(planes: int = SHAPE[0]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    lesions, liver = np.zeros((planes, *SHAPE[1:]), bool), np.zeros((planes, *SHAPE[1:]), bool)
    liver[: max(1, planes - 1), 1:9, 2:14] = True
    lesions[: max(1, planes - 3), 2:4, 3:8] = True  # lesion 1, not symmetric
    lesions[0, 7, 11] = True  # lesion 2: one voxel
    return lesions, liver


def read_segments(path: Path, lowest: NDArray[np.float64], normal: NDArray[np.float64]) -> dict[int, NDArray[Any]]:
    """Return each segment as planes along the ascending normal, placed by the positions of its frames."""
    data = pydicom.dcmread(path)
    pixels = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    segments = {
        each.SegmentNumber: np.zeros((SHAPE[0], data.Rows, data.Columns), bool) for each in data.SegmentSequence
    }
    for frame, place in zip(pixels, data.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(place.PlanePositionSequence[0].ImagePositionPatient, float)
        plane = round(float((position - lowest) @ normal) / 2.5)
        segments[place.SegmentIdentificationSequence[0].ReferencedSegmentNumber][plane] = frame
    return segments


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_voxel_is_where_it_was(name: str, tmp_path: Path) -> None:
    row, column, sign = ORIENTATIONS[name]
    scan = write_series(tmp_path / "scan", row, column, sign)
    lesions, liver = masks()
    case = write_case(scan, tmp_path / "case", lesions, liver)
    seg, _, _ = write_dicom_results(scan, case, tmp_path, made=MADE)
    normal = np.cross(np.array(row, float), np.array(column, float))
    positions = [np.array(each.ImagePositionPatient, float) for each in source_series(scan).headers]
    found = read_segments(seg, positions[0], normal)
    assert len(found) == 3
    np.testing.assert_array_equal(found[1], liver & ~lesions)
    np.testing.assert_array_equal(found[2] | found[3], lesions)
    assert found[3].sum() == 1
    # by the source images that the frames refer to
    read = highdicom.seg.segread(seg)
    headers = source_series(scan).headers
    uids = [each.SOPInstanceUID for each in headers]
    by_source = read.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(by_source[..., 1].astype(bool), found[2])
    shared = pydicom.dcmread(seg).SharedFunctionalGroupsSequence[0]
    np.testing.assert_allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (*row, *column), atol=1e-6)
    # the grid is the product's own, and ITK reads the same frames
    assert source_series(scan).geometry.canonical_shape == read_scan(scan).geometry.canonical_shape
    np.testing.assert_allclose(source_series(scan).geometry.affine, read_scan(scan).geometry.affine, atol=1e-6)
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(seg)))
    np.testing.assert_array_equal(itk.astype(bool), pydicom.dcmread(seg).pixel_array.astype(bool))


def to_multi_frame(scan: Path, path: Path) -> Path:
    """Write the headers of a series as one enhanced file, with its frames in a shuffled order and long decimals."""
    headers = [pydicom.dcmread(each) for each in sorted(scan.iterdir())]
    data, first = pydicom.Dataset(), headers[0]
    data.update({each.tag: each for each in first if each.keyword not in ("ImagePositionPatient", "PixelData")})
    data.file_meta = first.file_meta
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    orientation, measures, shared = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = first.PixelSpacing, first.SliceThickness
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], []
    for index in np.random.default_rng(1).permutation(len(headers)):
        place, frame = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = headers[index].ImagePositionPatient
        frame.PlanePositionSequence = [place]
        data.PerFrameFunctionalGroupsSequence.append(frame)
    data.NumberOfFrames = len(headers)
    data.PixelData = b"".join(each.PixelData for each in headers)
    data.save_as(path, enforce_file_format=True)
    return path


def test_a_multi_frame_file_with_shuffled_frames(tmp_path: Path) -> None:
    scan = to_multi_frame(write_series(tmp_path / "scan", *ORIENTATIONS["axial"]), tmp_path / "enhanced.dcm")
    lesions, liver = masks()
    seg, report, _ = write_dicom_results(scan, write_case(scan, tmp_path / "case", lesions, liver), tmp_path, made=MADE)
    found = read_segments(seg, np.array([-31.5, 12.25, -804.5]), np.array([0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(found[1], liver & ~lesions)
    np.testing.assert_array_equal(found[2] | found[3], lesions)
    places = [each.PlanePositionSequence[0] for each in pydicom.dcmread(scan).PerFrameFunctionalGroupsSequence]
    for frame in pydicom.dcmread(seg).PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == pydicom.dcmread(scan).SOPInstanceUID
        place = places[source.ReferencedFrameNumber - 1]
        assert place.ImagePositionPatient == frame.PlanePositionSequence[0].ImagePositionPatient
    assert len(highdicom.sr.srread(report).content.get_volumetric_roi_measurement_groups()) == 2


def test_the_report_measures_what_the_segments_mark(tmp_path: Path) -> None:
    scan = write_series(tmp_path / "scan", *ORIENTATIONS["axial"])
    case = write_case(scan, tmp_path / "case", *masks())
    seg, report, document = write_dicom_results(scan, case, tmp_path, made=MADE)
    tree = highdicom.sr.srread(report)
    groups = tree.content.get_volumetric_roi_measurement_groups()
    segmentation = pydicom.dcmread(seg)
    figures = [[(m.name.meaning, m.value, m.unit.value) for m in group.get_measurements()] for group in groups]
    voxel_ml = 0.7 * 0.9 * 2.5 / 1000
    assert [row[0] for row in figures] == [
        ("Volume", pytest.approx(50 * voxel_ml, abs=1e-4), "mL"),
        ("Volume", pytest.approx(voxel_ml, abs=1e-4), "mL"),
    ]
    assert figures[0][1] == ("Diameter", pytest.approx(np.hypot(np.hypot(4 * 0.7, 0.9), 4 * 2.5), abs=1e-3), "mm")
    assert figures[1][2] == ("Attenuation Coefficient", 37.5, "[hnsf'U]")
    for group, described in zip(groups, segmentation.SegmentSequence[1:], strict=True):
        assert group.tracking_uid == described.TrackingUID
        assert group.finding_type.value == "52988006"
        reference = group.referenced_segment
        assert reference.referenced_sop_instance_uid == segmentation.SOPInstanceUID
        assert reference.referenced_segment_numbers == [described.SegmentNumber]
    first = pydicom.dcmread(scan / "000.dcm")
    for path in (seg, report, document):
        data = pydicom.dcmread(path)
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "StudyDate"):
            assert data[keyword].value == first[keyword].value
    assert pydicom.dcmread(document).EncapsulatedDocument.startswith(b"%PDF")
    assert b"SECRET" not in pydicom.dcmread(document).EncapsulatedDocument
    assert segmentation.SeriesNumber == 5003


def test_equal_results_have_equal_bytes_and_others_have_other_uids(tmp_path: Path) -> None:
    scan = write_series(tmp_path / "scan", *ORIENTATIONS["axial"])
    lesions, liver = masks()
    case = write_case(scan, tmp_path / "case", lesions, liver)
    lesions[0, 7, 11] = False
    other = write_case(scan, tmp_path / "other", lesions, liver)
    for name in "abcd":
        (tmp_path / name).mkdir()
    first = write_dicom_results(scan, case, tmp_path / "a", made=MADE)
    again = write_dicom_results(scan, case, tmp_path / "b", made=MADE)
    later = write_dicom_results(scan, case, tmp_path / "c", made=datetime(2025, 1, 1))
    changed = write_dicom_results(scan, other, tmp_path / "d", made=MADE)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    uids = [[pydicom.dcmread(path).SOPInstanceUID for path in paths] for paths in (first, later, changed)]
    assert uids[0] == uids[1]
    assert not set(uids[0]) & set(uids[2])


@pytest.mark.parametrize("planes", [1, SHAPE[0]], ids=["one slice", "no lesion"])
def test_one_slice_and_no_lesion(planes: int, tmp_path: Path) -> None:
    scan = write_series(tmp_path / "scan", *ORIENTATIONS["axial"], planes=planes)
    lesions, liver = masks(planes)
    if planes > 1:
        lesions[:] = False
    seg, report, _ = write_dicom_results(scan, write_case(scan, tmp_path / "case", lesions, liver), tmp_path, made=MADE)
    assert len(pydicom.dcmread(seg).SegmentSequence) == (3 if planes == 1 else 1)
    assert len(highdicom.sr.srread(report).content.get_volumetric_roi_measurement_groups()) == (2 * (planes == 1))


def test_many_lesions_share_the_last_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "MOST_LESIONS", 2)
    monkeypatch.setattr("medad.dicom_out.results.MOST_LESIONS", 2)
    scan = write_series(tmp_path / "scan", *ORIENTATIONS["axial"])
    lesions, liver = masks()
    lesions[6, 6, 4] = lesions[6, 6, 8] = True
    seg, report, _ = write_dicom_results(scan, write_case(scan, tmp_path / "case", lesions, liver), tmp_path, made=MADE)
    labels = [each.SegmentLabel for each in pydicom.dcmread(seg).SegmentSequence]
    assert labels == ["Liver without lesions", "Lesion 1", "Lesion 2", "Lesions 3 to 4"]
    found = read_segments(seg, np.array([-31.5, 12.25, -804.5]), np.array([0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(found[2] | found[3] | found[4], lesions)
    assert found[4].sum() == 2
    last = highdicom.sr.srread(report).content.get_volumetric_roi_measurement_groups()[-1]
    assert len(last.get_measurements()) == 1


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    scan = write_series(tmp_path / "scan", *ORIENTATIONS["axial"])
    case = write_case(scan, tmp_path / "case", *masks())
    with pytest.raises(InputError, match="it has no study to which DICOM results could belong"):
        write_dicom_results(case / "mask.nii.gz", case, tmp_path)
    (tmp_path / "gap").mkdir()
    for path in sorted(scan.iterdir())[:5] + sorted(scan.iterdir())[6:]:
        shutil.copy(path, tmp_path / "gap")
    with pytest.raises(InputError, match="uneven slice spacing"):
        write_dicom_results(tmp_path / "gap", case, tmp_path)
    table = json.loads((case / "lesions.json").read_text(encoding="utf-8"))
    (case / "lesions.json").write_text(json.dumps(table | {"lesions": table["lesions"][:1]}), encoding="utf-8")
    with pytest.raises(InputError, match=r"2 lesions, but lesions\.json lists 1"):
        write_dicom_results(scan, case, tmp_path)
    assert not (tmp_path / "seg.dcm").exists()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy of dicom3tools is not installed")
def test_dciodvfy_finds_no_error(tmp_path: Path) -> None:
    scan = write_series(tmp_path / "scan", *ORIENTATIONS["oblique"])
    for path in write_dicom_results(scan, write_case(scan, tmp_path / "case", *masks()), tmp_path, made=MADE):
        ran = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, encoding="utf-8", check=False)
        errors = [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("Error")]
        assert not errors, errors


def with_raw_value(scan: Path, folder: Path, keyword: str, value: bytes | None) -> Path:
    """Copy a series with this value in each header, as bytes that pydicom does not check. None: without the tag."""
    folder.mkdir()
    for file in scan.iterdir():
        data = pydicom.dcmread(file)
        tag = pydicom.tag.Tag(keyword)
        if keyword in data:
            del data[tag]
        if value is not None:
            vr = pydicom.datadict.dictionary_VR(tag)
            data._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True, True)
        data.save_as(folder / file.name)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("keyword", "value", "kept"),
    [
        ("StudyDate", b"2024-01-01", None),
        ("StudyDate", b"20241399", None),
        ("StudyTime", b"25:61:00", None),
        ("PatientBirthDate", b"00000000", None),
        ("PatientBirthDate", b"unknown ", None),
        ("PatientSex", b"female", None),
        ("PatientName", b"A^B\\C^D ", None),
        ("PatientName", b"M\xfcller^Eva ", "M\u00fcller^Eva"),
        ("PatientID", b"P" * 90, "P" * 90),
        ("AccessionNumber", b"12345678901234567890", "12345678901234567890"),
        ("SpecificCharacterSet", b"ISO_IR 999", "ISO_IR 192"),
        ("SpecificCharacterSet", b"ISO 2022 IR 87", "ISO_IR 192"),
        ("SpecificCharacterSet", b"\\ISO 2022 IR 87", "ISO_IR 192"),
        ("StudyDate", None, None),
        ("PatientName", None, None),
        ("StudyID", None, None),
        ("SpecificCharacterSet", None, "ISO_IR 192"),
    ],
)
def test_a_header_that_is_not_allowed_costs_no_result(
    keyword: str, value: bytes | None, kept: str | None, tmp_path: Path
) -> None:
    good = write_series(tmp_path / "good", *ORIENTATIONS["axial"])
    if keyword == "PatientName" and kept:
        good = with_raw_value(good, tmp_path / "latin", "SpecificCharacterSet", b"ISO_IR 100")
    scan = with_raw_value(good, tmp_path / "scan", keyword, value)
    case = write_case(scan, tmp_path / "case", *masks())
    said: list[str] = []
    paths = write_dicom_results(scan, case, tmp_path, made=MADE, say=said.append)
    assert [path.name for path in paths] == ["seg.dcm", "sr.dcm", "report.dcm"]
    for path in paths:
        assert (str(pydicom.dcmread(path).get(keyword) or "") or None) == kept
    emptied = kept is None and value is not None
    assert said == [f"not valid in the scan, and empty in the DICOM results: {keyword}"] * emptied


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [b"abc ", b"0 ", b"-2.5", None])
def test_a_thickness_that_is_none_becomes_the_distance_of_planes(value: bytes | None, tmp_path: Path) -> None:
    good = write_series(tmp_path / "good", *ORIENTATIONS["axial"])
    scan = with_raw_value(good, tmp_path / "scan", "SliceThickness", value)
    seg, *_ = write_dicom_results(scan, write_case(scan, tmp_path / "case", *masks()), tmp_path, made=MADE)
    shared = pydicom.dcmread(seg).SharedFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].SliceThickness == pytest.approx(2.5)


@pytest.mark.parametrize("error", [ValueError("Mustermann^Max"), AttributeError("Mustermann"), KeyError("Mustermann")])
def test_what_cannot_be_made_is_one_line_and_leaves_no_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    scan = write_series(tmp_path / "scan", *ORIENTATIONS["axial"])
    case = write_case(scan, tmp_path / "case", *masks())
    monkeypatch.setattr("medad.dicom_out.results.make_document", fails)
    with pytest.raises(InputError, match=rf"headers break a rule of DICOM \({type(error).__name__}\)") as caught:
        write_dicom_results(scan, case, tmp_path, made=MADE)
    assert "Mustermann" not in str(caught.value)
    assert list(tmp_path.glob("*.dcm")) == []


def test_cavities_of_the_liver_are_liver(tmp_path: Path) -> None:
    scan = write_series(tmp_path / "scan", *ORIENTATIONS["axial"])
    lesions, liver = masks()
    hollow = liver.copy()
    hollow[3, 5, 6] = False
    seg, *_ = write_dicom_results(scan, write_case(scan, tmp_path / "case", lesions, hollow), tmp_path, made=MADE)
    positions = [np.array(each.ImagePositionPatient, float) for each in source_series(scan).headers]
    found = read_segments(seg, positions[0], np.array([0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(found[1], liver & ~lesions)
