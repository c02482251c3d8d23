"""Reading of masks that name their segments: 3D Slicer's .seg.nrrd, DICOM SEG and RTSTRUCT.

SEG and RTSTRUCT have no grid of their own that must be stored in full. So they are read onto the grid of their scan.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from jaxtyping import Integer
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.base.storage import reading
from medad.ct.dicom_files import is_dicom
from medad.ct.geometry import GRID_TOLERANCE_VOXELS, Geometry, check_affine
from medad.ct.itk import affine_from_itk, check_files, header_text, read_itk, silence_itk_warnings
from medad.ct.segments import Segment, choose_segments
from medad.ct.voxels import LabelSink

if TYPE_CHECKING:
    from pydicom import Dataset

SEG, LABELMAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
_MASKS = (SEG, LABELMAP, RTSTRUCT)
_LIVER_CODES = (("SCT", "10200004"), ("SRT", "T-62000"), ("99SDM", "T-62000"))
_FRAME_TOLERANCE_VOXELS = 0.45
"""Largest distance of a frame's pixels from voxels of the scan. At half a voxel the nearest one would be ambiguous."""
_CONTOUR_TOLERANCE_VOXELS = 0.25
"""Largest distance of a contour from the middle of its slice."""
_Drawer = Callable[[NDArray[Any], int], None]


def mask_file(path: Path) -> Path | None:
    """Return the DICOM SEG or RTSTRUCT file of a path: the file itself, or the only file of a folder. None: neither."""
    if path.is_dir():
        with reading(path):
            files = [file for file in path.iterdir() if not file.name.startswith(".")]
        path = files[0] if len(files) == 1 else path
    if not path.is_file() or not is_dicom(path):
        return None
    return path if _sop_class(path) in _MASKS else None


def read_dicom_mask(
    path: Path, scan: Geometry, liver_labels: Sequence[int]
) -> tuple[Integer[np.ndarray, "X Y Z"], list[str]]:
    """Read a DICOM SEG or RTSTRUCT onto the grid of its scan. Return values in canonical order, and notes.

    `choose_segments` says which segments are read.

    Raises
    ------
    InputError
        The file is damaged, lies on another grid, or its segments name no liver.
    """
    notes: dict[str, None] = {}
    try:
        data = _dataset(path)
        make = _contours if data.SOPClassUID == RTSTRUCT else _frames
        segments, draw = make(data, scan, path, notes)
        chosen = choose_segments(segments, liver_labels, path)
        dtype = np.uint8 if max(chosen.values()) <= np.iinfo(np.uint8).max else np.int32
        values = np.zeros(scan.shape, dtype, order="F")
        for number, value in chosen.items():
            draw[number](values, value)
    except InputError:
        raise
    except Exception as error:  # as in `_sop_class`
        raise InputError(path, f"not readable as DICOM SEG or RTSTRUCT ({type(error).__name__})") from error
    return scan.to_canonical(values), list(notes)


def _sop_class(path: Path) -> str | None:
    """Return the UID that says what a DICOM file contains. None: it is damaged."""
    try:
        return str(_dataset(path, ["SOPClassUID"]).SOPClassUID)
    except Exception:  # libraries report damage by errors of many classes
        return None


def _dataset(path: Path, tags: list[str | int] | None = None) -> Dataset:
    import pydicom

    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values
        return pydicom.dcmread(path, force=True, specific_tags=tags)


# ---------------------------------------------------------------- DICOM SEG


def _frames(
    data: Dataset, scan: Geometry, path: Path, notes: dict[str, None]
) -> tuple[list[Segment], dict[int, _Drawer]]:
    segments = [_seg_segment(item) for item in data.SegmentSequence]
    labelmap = data.get("SegmentationType") == "LABELMAP" or data.SOPClassUID == LABELMAP
    half = data.get("MaximumFractionalValue", 255) / 2 if data.get("SegmentationType") == "FRACTIONAL" else 0.5
    frames = list(data.PerFrameFunctionalGroupsSequence)
    shared = data.SharedFunctionalGroupsSequence[0] if data.get("SharedFunctionalGroupsSequence") else None
    members: dict[int, list[int]] = {each.number: [] for each in segments}
    for index, frame in enumerate(frames):
        found = list(members)
        if not labelmap:
            found = [int(_group(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)]
        for number in found:
            members[number].append(index)

    def drawer(number: int) -> _Drawer:
        def draw(values: NDArray[Any], value: int) -> None:
            planes = set()
            for index, pixels in zip(members[number], _pixels(data, members[number]), strict=True):
                rows, columns = np.nonzero(pixels == number if labelmap else pixels >= half)
                first, row, column = _place(frames[index], shared, data, scan, path, notes)
                if not rows.size:
                    continue
                voxels = first + rows[:, None] * row + columns[:, None] * column
                if (voxels < 0).any() or (voxels >= scan.shape).any():
                    raise InputError(path, "the segmentation lies partly outside the scan")
                values[tuple(voxels.T)] = value
                planes.add(int(voxels[0, int(np.flatnonzero((row == 0) & (column == 0))[0])]))
            _check_gaps(planes, path)

        return draw

    return segments, {number: drawer(number) for number in members}


def _seg_segment(item: Dataset) -> Segment:
    codes = item.get("SegmentedPropertyTypeCodeSequence") or []
    coded = any((code.get("CodingSchemeDesignator"), code.get("CodeValue")) in _LIVER_CODES for code in codes)
    return Segment(int(item.SegmentNumber), str(item.get("SegmentLabel", "")), coded)


def _pixels(data: Dataset, indices: list[int]) -> Iterator[NDArray[Any]]:
    from pydicom.pixels import iter_pixels

    if not indices:
        return
    if int(data.get("NumberOfFrames", 1)) == 1:
        yield np.squeeze(data.pixel_array)
        return
    yield from iter_pixels(data, indices=indices)


def _group(frame: Dataset, shared: Dataset | None, name: str) -> Dataset:
    """Return the item of a functional group, of the frame or of all frames."""
    sequence = frame.get(name) or (shared.get(name) if shared is not None else None)
    if not sequence:
        raise KeyError(name)
    found: Dataset = sequence[0]
    return found


def _place(
    frame: Dataset, shared: Dataset | None, data: Dataset, scan: Geometry, path: Path, notes: dict[str, None]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the scan's voxel of a frame's first pixel, and the steps to the next row and the next column."""
    origin = np.array(_group(frame, shared, "PlanePositionSequence").ImagePositionPatient, dtype=np.float64)
    directions = np.array(_group(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
    row_mm, column_mm = (float(mm) for mm in _group(frame, shared, "PixelMeasuresSequence").PixelSpacing)
    along_row, along_column = directions[:3] * column_mm, directions[3:] * row_mm
    to_voxel = np.linalg.inv(scan.affine)
    first = _voxel(to_voxel, origin)
    row, column = (_voxel(to_voxel, origin + step) - first for step in (along_column, along_row))
    rows, columns = int(data.Rows) - 1, int(data.Columns) - 1
    steps = [np.rint(each).astype(np.int64) for each in (first, row, column)]
    corners = [(i, j) for i in (0, rows) for j in (0, columns)]
    distance = max(
        float(np.abs(first + i * row + j * column - (steps[0] + i * steps[1] + j * steps[2])).max()) for i, j in corners
    )
    # opposite signs or the same axis twice cannot give two axes of the grid
    if distance > _FRAME_TOLERANCE_VOXELS or sorted(np.abs(steps[1] + 2 * steps[2]).tolist()) != [0, 1, 2]:
        raise InputError(path, f"the segmentation is up to {distance:.3g} voxels away from the scan's grid")
    if distance > GRID_TOLERANCE_VOXELS:
        notes["the grid of the segmentation is rounded; its frames were put on the nearest voxels of the scan"] = None
    return steps[0], steps[1], steps[2]


def _voxel(to_voxel: NDArray[Any], lps: NDArray[Any]) -> NDArray[np.float64]:
    """Return voxel indices of points in LPS mm."""
    ras = lps * (-1, -1, 1)
    found: NDArray[np.float64] = ras @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    return found


def _check_gaps(planes: set[int], path: Path) -> None:
    steps = np.diff(sorted(planes))
    if steps.size and steps.min() > 1:
        raise InputError(path, f"its planes lie {steps.min()} slices apart on the scan's grid; interpolate it first")


# ---------------------------------------------------------------- RTSTRUCT


def _contours(
    data: Dataset, scan: Geometry, path: Path, notes: dict[str, None]
) -> tuple[list[Segment], dict[int, _Drawer]]:
    del notes
    names = {int(item.ROINumber): str(item.get("ROIName", "")) for item in data.StructureSetROISequence}
    contours = {int(item.ReferencedROINumber): item.get("ContourSequence") or [] for item in data.ROIContourSequence}
    to_voxel = np.linalg.inv(scan.affine)

    def drawer(number: int) -> _Drawer:
        def draw(values: NDArray[Any], value: int) -> None:
            outlines = [
                _voxel(to_voxel, np.array(each.ContourData, dtype=np.float64).reshape(-1, 3))
                for each in contours[number]
                if each.ContourGeometricType in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
            ]
            if not outlines:
                raise InputError(path, "the ROI has no closed contour")
            axis = int(np.ptp(outlines[0], axis=0).argmin())
            _draw_contours(values, value, outlines, axis, path)

        return draw

    shown = [Segment(number, name) for number, name in names.items() if number in contours]
    return shown, {each.number: drawer(each.number) for each in shown}


def _draw_contours(
    values: NDArray[Any], value: int, outlines: list[NDArray[np.float64]], axis: int, path: Path
) -> None:
    """Fill contours, given in voxels. A voxel is inside if its centre is inside an odd number of them."""
    crossings: dict[int, NDArray[np.int32]] = {}
    across = [other for other in range(3) if other != axis]
    rows, columns = (values.shape[other] for other in across)
    for points in outlines:
        plane = int(np.rint(points[:, axis].mean()))
        distance = float(np.abs(points[:, axis] - plane).max())
        if distance > _CONTOUR_TOLERANCE_VOXELS:
            raise InputError(path, f"a contour lies {distance:.2g} voxels off the scan's slices")
        if not 0 <= plane < values.shape[axis]:
            raise InputError(path, "a contour lies outside the scan")
        counts = crossings.setdefault(plane, np.zeros((rows, columns + 1), np.int32))
        _count_crossings(counts, points[:, across])
    for plane, counts in crossings.items():
        section = np.moveaxis(values, axis, 0)[plane]
        section[np.cumsum(counts, axis=1)[:, :columns] % 2 == 1] = value
    _check_gaps(set(crossings), path)


def _count_crossings(counts: NDArray[np.int32], polygon: NDArray[np.float64]) -> None:
    """Count for each row the edges of a polygon before each column. Rows and columns are voxel centres."""
    for (row, column), (next_row, next_column) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        first, last = sorted((row, next_row))
        crossed = np.arange(max(int(np.ceil(first)), 0), min(int(np.ceil(last)), len(counts)))  # without `last`
        if crossed.size:
            at = column + (crossed - row) * (next_column - column) / (next_row - row)
            np.add.at(counts, (crossed, np.clip(np.ceil(at), 0, counts.shape[1] - 1).astype(int)), 1)


# ---------------------------------------------------------------- 3D Slicer


def read_seg_nrrd(path: Path, liver_labels: Sequence[int]) -> tuple[NDArray[Any], Geometry] | None:
    """Read an NRRD file that names its segments. Return values in the file's order and the grid. None: it names none.

    Segments that overlap lie in several layers of the file. Raises InputError.
    """
    fields: dict[int, dict[str, str]] = {}
    for index, key, text in re.findall(r"(?m)^Segment(\d+)_(\w+):=(.*?)\r?$", header_text(path)):
        fields.setdefault(int(index), {})[key] = text.strip()
    if not fields:
        return None
    try:
        stored = [
            (int(each.get("Layer", index)), int(each.get("LabelValue", 1)), each.get("Name", ""))
            for index, each in sorted(fields.items())
        ]
    except ValueError as error:
        raise InputError(path, "a segment's layer or value is not a number") from error
    numbers = [value for _, value, _ in stored]
    if len(set(numbers)) < len(numbers):
        numbers = [index + 1 for index in range(len(stored))]
    segments = [Segment(number, name) for number, (_, _, name) in zip(numbers, stored, strict=True)]
    chosen = choose_segments(segments, liver_labels, path)
    layers, geometry = _layers(path)
    values = np.zeros(geometry.shape, np.uint8 if max(chosen.values()) <= np.iinfo(np.uint8).max else np.int32)
    where = dict(zip(numbers, stored, strict=True))
    for number, value in chosen.items():
        layer, label, _ = where[number]
        layer = layer if len(layers) > 1 else 0
        if not 0 <= layer < len(layers):
            raise InputError(path, f"a segment's layer {layer} is missing")
        values[layers[layer] == label] = value
    return values, geometry


def _layers(path: Path) -> tuple[list[NDArray[Any]], Geometry]:
    """Return the layers of a label map in the file's order, and the grid."""
    check_files(path)
    reader = sitk.ImageFileReader()
    silence_itk_warnings()
    reader.SetImageIO("NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        components = reader.GetNumberOfComponents()
    except RuntimeError as error:
        raise InputError(path, "not readable as NRRD: it is cut short or its header is wrong") from error
    if components == 1:
        sink, geometry = read_itk(path, lambda voxels: LabelSink(voxels, path))
        return [sink.flat.reshape(geometry.shape, order="F")], geometry
    affine = affine_from_itk(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin())
    check_affine(affine, path)
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise InputError(path, "not readable as NRRD: it is cut short or its header is wrong") from error
    if array.ndim != 4:
        raise InputError(path, "expected layers of three dimensions")
    z, y, x = array.shape[:3]
    return [array[..., layer].T for layer in range(components)], Geometry((x, y, z), affine)
