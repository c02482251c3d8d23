"""Masks that name their segments: DICOM SEG, RTSTRUCT, and segmentations of 3D Slicer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray
from pydicom.sr.codedict import codes

from medad.base.errors import InputError
from medad.ct import checks, io
from medad.ct.geometry import Geometry
from medad.ct.headers import header_texts
from medad.ct.segments import Segment, choose_segments
from tests.medad.ct_series import save_slice

SIZE = (12, 16, 20)
"""Planes, rows and columns of the series."""
ORIGIN, SPACING = np.array([-80.0, -60.0, 100.0]), np.array([0.8, 0.7, 3.0])
"""Position and voxel size along columns, rows and planes, in LPS mm."""


def organ(number: int = 0) -> NDArray[np.bool_]:
    """Return a mask [planes, rows, columns] without symmetry, with a hole in it."""
    mask = np.zeros(SIZE, np.bool_)
    mask[3 + number : 9, 2:10, 4 + number : 15] = True
    mask[5, 4:6, 7:9] = False
    mask[3 + number, 2, 4 + number] = False
    return mask


def canonical(mask: NDArray[Any]) -> NDArray[Any]:
    return mask.transpose(2, 1, 0)


@pytest.fixture(name="series")
def _series(tmp_path: Path) -> Path:
    folder = tmp_path / "series"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(SIZE[0]):
        save_slice(
            folder / f"{k:02d}.dcm",
            k,
            rng.integers(0, 200, SIZE[1:]).astype(np.int16),
            PixelSpacing=[SPACING[1], SPACING[0]],
            SliceThickness=SPACING[2],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[*ORIGIN[:2], ORIGIN[2] + k * SPACING[2]],
            RescaleSlope=1,
            RescaleIntercept=0,
            FrameOfReferenceUID="2.25.99",
            StudyID="1",
            AccessionNumber="",
            StudyDate="20200101",
            StudyTime="000000",
            PatientBirthDate="",
            PatientSex="",
            ReferringPhysicianName="",
        )
    return folder


@pytest.fixture(name="scan")
def _scan(series: Path) -> Geometry:
    return io.read_scan(series).geometry


def write_seg(path: Path, series: Path, masks: dict[str, NDArray[Any]], kind: str = "BINARY", **options: Any) -> Path:
    """Write a DICOM SEG with highdicom: a segment for each name."""
    images = [pydicom.dcmread(file) for file in sorted(series.iterdir())]
    algorithm = highdicom.AlgorithmIdentificationSequence("x", codes.DCM.ArtificialIntelligence, "1")
    segments = [
        highdicom.seg.SegmentDescription(
            number,
            name,
            CodedConcept("123037004", "SCT", "Anatomical Structure"),
            CodedConcept("10200004" if name == "coded" else "91723000", "SCT", "Structure"),
            highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm,
        )
        for number, name in enumerate(masks, start=1)
    ]
    array = np.stack(list(masks.values()), axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = highdicom.seg.Segmentation(
            images,
            array if kind == "FRACTIONAL" else array.astype(np.uint8),
            kind,
            segments,
            series_instance_uid="2.25.1",
            series_number=2,
            sop_instance_uid="2.25.2",
            instance_number=1,
            manufacturer="x",
            manufacturer_model_name="x",
            software_versions="1",
            device_serial_number="1",
            **options,
        )
    made.save_as(path)
    return path


@pytest.mark.parametrize("names", [("liver",), ("Segment 1",), ("spleen", "Liver", "tumour"), ("spleen", "coded")])
def test_dicom_seg_of_the_liver(tmp_path: Path, series: Path, scan: Geometry, names: tuple[str, ...]) -> None:
    place = next((i for i, name in enumerate(names) if name in ("Liver", "coded")), 0)
    path = write_seg(tmp_path / "seg", series, {name: organ(i) for i, name in enumerate(names)})
    labels, warning = io.read_labels_on(scan, path)
    assert warning is None
    np.testing.assert_array_equal(labels.values, canonical(organ(place)))
    assert io.source_files(path) == [path]
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "1.dcm")
    in_folder, _ = io.read_labels_on(scan, folder)
    np.testing.assert_array_equal(in_folder.values, labels.values)
    assert io.source_files(folder) == [folder / "1.dcm"]
    assert io.source_digest(folder) == io.source_digest(folder / "1.dcm")


def test_dicom_seg_on_a_nifti_scan_in_another_order(tmp_path: Path, series: Path, scan: Geometry) -> None:
    """The scan was converted to RAS order, as dcm2niix and others do."""
    path = write_seg(tmp_path / "seg.dcm", series, {"liver": organ()})
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = scan.canonical_affine[:3, :] @ [SIZE[2] - 1, SIZE[1] - 1, 0, 1]
    turned = Geometry((SIZE[2], SIZE[1], SIZE[0]), affine)
    labels, _ = io.read_labels_on(turned, path)
    np.testing.assert_array_equal(labels.values, canonical(organ()))
    np.testing.assert_array_equal(turned.to_source(labels.values), canonical(organ())[::-1, ::-1])


def test_fractional_seg_counts_from_one_half(tmp_path: Path, series: Path, scan: Geometry) -> None:
    fraction = organ() * np.float64(0.6) + organ(2) * 0.3 + ~organ() * 0.2
    path = write_seg(tmp_path / "seg.dcm", series, {"liver": fraction}, "FRACTIONAL")
    np.testing.assert_array_equal(io.read_labels_on(scan, path)[0].values, canonical(organ()))


def test_segments_by_number(tmp_path: Path, series: Path, scan: Geometry) -> None:
    masks = {"spleen": organ(2), "Mueller": organ(1), "left kidney": organ(0)}
    path = write_seg(tmp_path / "seg.dcm", series, masks)
    rule = r"none of its 3 segments is named liver: 1 spleen, 2 \?, 3 left kidney; choose by number with --liver-label"
    with pytest.raises(InputError, match=rule):
        io.read_labels_on(scan, path)
    labels, _ = io.read_labels_on(scan, path, liver_labels=(2,))
    np.testing.assert_array_equal(checks.require_liver(labels, (2, 3), path), canonical(organ(0)))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda data: _shift(data, 0.4), r"0\.5 voxels away from the scan's grid"),
        (lambda data: _set_spacing(data, 0.75), "voxels away from the scan's grid"),
        (lambda data: _shift(data, 800), "lies partly outside the scan"),
        (lambda data: setattr(data, "PixelData", data.PixelData[:10]), "not readable as DICOM SEG"),
        (lambda data: delattr(data, "PerFrameFunctionalGroupsSequence"), "not readable as DICOM SEG"),
        (lambda data: setattr(data, "SegmentSequence", []), "contains no segment|not readable"),
    ],
)
def test_a_seg_that_does_not_fit(tmp_path: Path, series: Path, scan: Geometry, change: Any, rule: str) -> None:
    path = write_seg(tmp_path / "seg.dcm", series, {"liver": organ()})
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)
    with pytest.raises(InputError, match=rule):
        io.read_labels_on(scan, path)


def _set_spacing(data: pydicom.Dataset, mm: float) -> None:
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [mm, mm]


def _shift(data: pydicom.Dataset, mm: float) -> None:
    for frame in data.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0]
        x, y, z = position.ImagePositionPatient
        position.ImagePositionPatient = [x + mm, y, z]


def test_a_rounded_seg_is_a_warning(tmp_path: Path, series: Path, scan: Geometry) -> None:
    path = write_seg(tmp_path / "seg.dcm", series, {"liver": organ()})
    data = pydicom.dcmread(path)
    _shift(data, 0.2)
    data.save_as(path)
    labels, warning = io.read_labels_on(scan, path)
    assert "rounded" in str(warning)
    np.testing.assert_array_equal(labels.values, canonical(organ()))


def test_other_dicom_files_are_not_masks(tmp_path: Path, series: Path, scan: Geometry) -> None:
    with pytest.raises(InputError, match=r"a DICOM file of another kind; a label must be .* a DICOM SEG or RTSTRUCT"):
        io.read_labels_on(scan, sorted(series.iterdir())[0])
    with pytest.raises(InputError, match="a folder with other content"):
        io.read_labels_on(scan, series)


def outline(rows: tuple[float, float], columns: tuple[float, float], plane: float) -> list[float]:
    """Return the corners of a rectangle, given in voxels, as LPS mm."""
    corners = [(columns[0], rows[0]), (columns[1], rows[0]), (columns[1], rows[1]), (columns[0], rows[1])]
    return [float(v) for column, row in corners for v in ORIGIN + SPACING * (column, row, plane)]


def write_rtstruct(path: Path, rois: dict[str, list[list[float]]]) -> Path:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.RTStructureSetStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "2.25.5"
    data.Modality, data.StructureSetLabel, data.PatientName = "RTSTRUCT", "SECRET", "SECRETNAME^X"
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, item = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName, item.ReferencedROINumber, item.ContourSequence = number, name, number, []
        for points in contours:
            contour = pydicom.Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points) // 3
            contour.ContourData = [f"{value:.4f}" for value in points]
            item.ContourSequence.append(contour)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(item)
    data.save_as(path, enforce_file_format=True)
    return path


def liver_contours() -> list[list[float]]:
    contours = [outline((1.5, 9.5), (3.5, 14.5), plane) for plane in range(3, 9)]
    return [*contours, outline((3.5, 5.5), (6.5, 8.5), 5)]


def test_rtstruct_is_filled_by_the_even_odd_rule(tmp_path: Path, scan: Geometry) -> None:
    body = [outline((0.5, 14.5), (0.5, 18.5), plane) for plane in range(SIZE[0])]
    path = write_rtstruct(tmp_path / "RS.1", {"BODY": body, "Liver": liver_contours(), "GTV": body[:1]})
    expected = organ()
    expected[3, 2, 4] = True  # a rectangle has all its corners
    labels, warning = io.read_labels_on(scan, path)
    assert warning is None
    np.testing.assert_array_equal(labels.values, canonical(expected))
    by_number, _ = io.read_labels_on(scan, path, liver_labels=(1, 2))
    assert np.count_nonzero(by_number.values) == 14 * 18 * SIZE[0]


def test_rtstruct_of_any_polygon_contains_the_centres_inside(tmp_path: Path, scan: Geometry) -> None:
    """A triangle with a thin bridge to a hole: the outline goes in and out along the same line."""
    from matplotlib.path import Path as Polygon

    corners = np.array([(1.3, 1.2), (18.4, 3.1), (9.7, 14.6)])
    points = [v for column, row in corners for v in ORIGIN + SPACING * (column, row, 4)]
    hole = outline((3.6, 6.4), (7.5, 11.3), 4)
    keyhole = [*points[:3], *hole, *hole[:3], *points[:3], *points[3:]]
    x, y = np.meshgrid(np.arange(SIZE[2]), np.arange(SIZE[1]))
    inside = Polygon(corners).contains_points(np.c_[x.ravel(), y.ravel()]).reshape(x.shape)
    inside[4:7, 8:12] = False
    for contours in ([points, hole], [keyhole]):
        path = write_rtstruct(tmp_path / "RS.1", {"liver": contours})
        labels, _ = io.read_labels_on(scan, path)
        np.testing.assert_array_equal(labels.values[:, :, 4].T, inside)
        assert not labels.values[:, :, [3, 5]].any()


@pytest.mark.parametrize(
    ("rois", "rule"),
    [
        ({"liver": [outline((1.5, 9.5), (3.5, 14.5), 4.4)]}, r"a contour lies 0\.4 voxels off the scan's slices"),
        ({"liver": [outline((1.5, 9.5), (3.5, 14.5), 14)]}, "outside the scan"),
        ({"liver": [outline((1.5, 9.5), (3.5, 14.5), k) for k in (2, 4, 6)]}, "planes lie 2 slices apart"),
        ({"liver": []}, "no closed contour"),
        (
            {"spleen": liver_contours(), "Liver-GTV": liver_contours()},
            "none of its 2 segments is named liver: 1 spleen",
        ),
        ({"liver": liver_contours(), "Leber": liver_contours()}, "2 of its 2 segments are named liver: 1 liver, 2"),
    ],
)
def test_a_rtstruct_that_does_not_fit(tmp_path: Path, scan: Geometry, rois: Any, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        io.read_labels_on(scan, write_rtstruct(tmp_path / "RS.dcm", rois))


def write_slicer(
    path: Path, array: NDArray[Any], first: tuple[int, int, int], segments: list[tuple[int, int, str]]
) -> Path:
    """Write a .seg.nrrd as 3D Slicer does. `array` is [planes, rows, columns(, layers)]; `first` is its first voxel."""
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    image.SetSpacing(SPACING.tolist())
    image.SetOrigin((ORIGIN + SPACING * first).tolist())
    for index, (layer, value, name) in enumerate(segments):
        fields = {"ID": f"Segment_{index}", "LabelValue": value, "Layer": layer, "Name": name}
        for key, text in fields.items():
            image.SetMetaData(f"Segment{index}_{key}", str(text))
    sitk.WriteImage(image, path, useCompression=True)
    return path


def test_slicers_cropped_segmentation_is_put_into_the_scan(tmp_path: Path, scan: Geometry) -> None:
    cropped = (organ() * np.uint8(3))[3:9, 2:10, 4:15]
    cropped[0, 0, 0] = 1
    path = write_slicer(tmp_path / "a.seg.nrrd", cropped, (4, 2, 3), [(0, 1, "spleen"), (0, 3, "Liver")])
    labels, warning = io.read_labels_on(scan, path)
    np.testing.assert_array_equal(labels.values, canonical(organ()))
    assert "the label covers 11 x 8 x 6 of the scan's 20 x 16 x 12 voxels" in str(warning)
    by_number, _ = io.read_labels_on(scan, path, liver_labels=(3,))
    assert sorted(np.unique(by_number.values)) == [0, 1, 3]
    one = write_slicer(tmp_path / "b.seg.nrrd", cropped // 3, (4, 2, 3), [(0, 1, "Segment_1")])
    np.testing.assert_array_equal(io.read_labels_on(scan, one)[0].values, canonical(organ()))


def test_slicers_overlapping_segments_lie_in_layers(tmp_path: Path, scan: Geometry) -> None:
    tumour = np.zeros(SIZE, np.bool_)
    tumour[6, 4:7, 6:9] = True
    layers = np.stack([organ(), tumour], axis=-1).astype(np.uint8)
    path = write_slicer(tmp_path / "a.seg.nrrd", layers, (0, 0, 0), [(0, 1, "liver"), (1, 1, "tumour")])
    labels, warning = io.read_labels_on(scan, path)
    assert warning is None
    np.testing.assert_array_equal(labels.values, canonical(organ()))
    both, _ = io.read_labels_on(scan, path, liver_labels=(1, 2))
    np.testing.assert_array_equal(both.values == 2, canonical(tumour))
    np.testing.assert_array_equal(both.values > 0, canonical(organ()))


def test_texts_of_masks_are_known_as_private(tmp_path: Path, series: Path) -> None:
    path = write_rtstruct(tmp_path / "RS.1", {"Liver": liver_contours()})
    assert {"SECRETNAME^X", "SECRETNAME"} <= set(header_texts(path))
    seg = write_seg(tmp_path / "seg.dcm", series, {"liver": organ()})
    assert {"SECRETNAME^X", "SECRETID"} <= set(header_texts(seg))
    slicer = write_slicer(tmp_path / "a.seg.nrrd", organ().astype(np.uint8), (0, 0, 0), [(0, 1, "Liver")])
    assert "Liver" not in header_texts(slicer)


def test_names_show_anatomy_alone() -> None:
    assert Segment(4, "Left Kidney, Mr. Mueller_2").shown == "4 left kidney ? ? 2"
    assert Segment(1, "LIVER_1").is_liver
    assert not Segment(1, "liver tumour").is_liver
    with pytest.raises(InputError, match="contains no segment"):
        choose_segments([], (1,), Path("x"))
