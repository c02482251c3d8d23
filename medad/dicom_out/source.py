"""The headers of a segmented DICOM series: to whose study results belong, and on which frames they lie.

Patient and study are copied from here into DICOM results only. No message shows the content of a tag. A value that
DICOM does not allow is empty in the results, where the standard allows that.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, TM, DSfloat

from medad.base.errors import InputError
from medad.ct.dicom import POSITION_TOLERANCE
from medad.ct.dicom_choice import choose_series, is_series
from medad.ct.dicom_files import read_header
from medad.ct.geometry import SPACING_TOLERANCE, Geometry, check_affine

_REQUIRED = ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
_TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
"""Attributes that results must have and that may be empty."""
_DATES_AND_TIMES: dict[str, Callable[[str], object]] = {
    "PatientBirthDate": DA,
    "StudyDate": DA,
    "StudyTime": TM,
}
"""Attributes with the types that check their values."""
_UTF_8 = "ISO_IR 192"


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """A series in the order of its planes along the normal."""

    headers: list[Dataset]
    """One header per plane, or one of a multi-frame file."""
    planes: list[int]
    """Number of the frame of each plane, from 0. It counts headers, or the frames of a multi-frame file."""
    geometry: Geometry
    """Grid with the axes column, row, plane."""
    emptied: tuple[str, ...] = ()
    """Names of attributes whose values were not allowed."""

    @property
    def first(self) -> Dataset:
        """Return the header from which patient and study are copied."""
        return self.headers[0]

    def frames(self, canonical: UInt8[np.ndarray, "X Y Z"]) -> UInt8[np.ndarray, "N R C"]:
        """Return an array in canonical order as frames, in the order of `headers` or of the file's frames."""
        stacked = self.geometry.to_source(canonical).transpose(2, 1, 0)
        frames = np.empty(stacked.shape, stacked.dtype)
        frames[self.planes] = stacked
        return frames


def source_headers(scan: Path) -> list[Dataset]:
    """Read the headers of a CT series.

    Raises
    ------
    InputError
        The scan is not DICOM, or has several series.
    """
    if not is_series(scan):
        raise InputError(scan, "not a DICOM series, so it has no study to which DICOM results could belong")
    headers = [read_header(file, None) for file in choose_series(scan)[0].files]
    return [header.data for header in headers if header is not None]


def source_series(scan: Path) -> SourceSeries:
    """Read and order the headers of a scan. Raises InputError if it is not DICOM or lacks an attribute."""
    emptied: set[str] = set()
    headers = [_complete(header, scan, emptied) for header in source_headers(scan)]
    many = "PerFrameFunctionalGroupsSequence" in headers[0]
    if many and len(headers) > 1:
        raise InputError(scan, "several multi-frame files; DICOM results belong to one")
    first = headers[0]
    try:
        if many:
            frames = list(first.PerFrameFunctionalGroupsSequence)
            shared = first.SharedFunctionalGroupsSequence[0]
            positions = [frame.PlanePositionSequence[0] for frame in frames]
            orientations = [_group(frame, shared, "PlaneOrientationSequence") for frame in frames]
            measures = [_group(frame, shared, "PixelMeasuresSequence") for frame in frames]
        else:
            positions = orientations = measures = headers
        _even_out(positions, orientations, scan)
        affine, order = _grid(
            np.array([each.ImagePositionPatient for each in positions], dtype=np.float64),
            np.array(orientations[0].ImageOrientationPatient, dtype=np.float64).reshape(2, 3),
            np.array(measures[0].PixelSpacing, dtype=np.float64),
            abs(float(measures[0].get("SpacingBetweenSlices") or measures[0].get("SliceThickness") or 1.0)),
            scan,
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        raise InputError(scan, "position, orientation or pixel spacing of the DICOM series is missing") from None
    check_affine(affine, scan)
    step_mm = DSfloat(float(np.linalg.norm(affine[:3, 2])), auto_format=True)
    for each in measures:  # both are copied into the segmentation
        each.SpacingBetweenSlices = step_mm  # may be 0 or negative
        if not _is_positive(each.get("SliceThickness")):
            each.SliceThickness = step_mm
    geometry = Geometry((int(first.Columns), int(first.Rows), len(order)), affine)
    if many:
        return SourceSeries(headers, order, geometry, tuple(sorted(emptied)))
    ordered = [headers[index] for index in order]
    return SourceSeries(ordered, list(range(len(order))), geometry, tuple(sorted(emptied)))


def uid_of(*content: str | bytes) -> str:
    """Return a UID that follows from its content, so that equal results have equal UIDs (PS3.5, annex B.2)."""
    digest = hashlib.sha256()
    for part in content:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return f"2.25.{uuid.UUID(bytes=digest.digest()[:16], version=5).int}"


def instance_uids(headers: Iterable[Dataset]) -> str:
    """Return the SOP Instance UIDs of the source images as one text."""
    return " ".join(str(header.SOPInstanceUID) for header in headers)


def _group(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    found: Dataset = (frame if keyword in frame else shared)[keyword].value[0]
    return found


def _even_out(positions: list[Dataset], orientations: list[Dataset], scan: Path) -> None:
    """Give all frames one orientation, and write positions as decimal strings of at most 16 characters."""
    first = np.array(orientations[0].ImageOrientationPatient, dtype=np.float64)
    for each in orientations:
        if np.abs(np.array(each.ImageOrientationPatient, dtype=np.float64) - first).max() > SPACING_TOLERANCE:
            raise InputError(scan, "slices of different orientation; DICOM results belong to one volume")
        each.ImageOrientationPatient = _decimals(first)
    for each in positions:
        each.ImagePositionPatient = _decimals(np.array(each.ImagePositionPatient, dtype=np.float64))
    if len({tuple(each.ImagePositionPatient) for each in positions}) < len(positions):
        raise InputError(scan, "two slices have the same position; DICOM results belong to one volume")


def _decimals(values: NDArray[np.float64]) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def _is_positive(value: object) -> bool:
    try:
        return float(value) > 0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _complete(header: Dataset, scan: Path, emptied: set[str]) -> Dataset:
    """Add the attributes that results must have and that may be empty, and empty those with values not allowed."""
    if missing := [keyword for keyword in _REQUIRED if not header.get(keyword)]:
        raise InputError(scan, f"{missing[0]} is missing, so DICOM results cannot refer to this series")
    header.decode()  # an unknown character set is read as Latin letters
    header.SpecificCharacterSet = _UTF_8
    for keyword in _TYPE_2:
        value = header.get(keyword)
        if value is None:
            setattr(header, keyword, "")
        elif not _is_allowed(keyword, value):
            setattr(header, keyword, "")
            emptied.add(keyword)
    if not header.get("FrameOfReferenceUID"):
        header.FrameOfReferenceUID = uid_of("frame of reference", str(header.SeriesInstanceUID))
    return header


def _is_allowed(keyword: str, value: object) -> bool:
    """Return whether results may have this value of an attribute that may be empty."""
    if isinstance(value, MultiValue):
        return False
    if keyword == "PatientSex":
        return value in ("", "M", "F", "O")
    try:
        _DATES_AND_TIMES.get(keyword, str)(str(value).strip())
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _grid(
    positions: NDArray[np.float64],
    axes: NDArray[np.float64],
    spacing: NDArray[np.float64],
    thickness: float,
    scan: Path,
) -> tuple[NDArray[np.float64], list[int]]:
    """Return the affine to RAS mm (column, row, plane), and the number of the frame of each plane."""
    normal = np.cross(axes[0], axes[1])
    order = np.argsort(positions @ normal, kind="stable")
    first, last = positions[order[0]], positions[order[-1]]
    step = (last - first) / (len(order) - 1) if len(order) > 1 else normal * thickness
    regular = first + np.arange(len(order))[:, None] * step
    if np.linalg.norm(positions[order] - regular, axis=1).max() > POSITION_TOLERANCE * np.linalg.norm(step):
        raise InputError(scan, "uneven slice spacing; DICOM results belong to one volume")
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * spacing[1]  # PixelSpacing is (between rows, between columns)
    affine[:3, 1] = axes[1] * spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first
    affine[:2] *= -1  # DICOM's patient axes are LPS
    return affine, [int(index) for index in order]
