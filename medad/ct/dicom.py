"""Reading and writing of a DICOM CT series: one folder, one file per slice.

Slices are ordered and placed by their positions, not by file name or instance number. No message shows the content of a
tag, because names, numbers and free text may identify a patient.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.base.storage import reading
from medad.ct.geometry import Geometry, check_affine
from medad.ct.itk import silence_itk_warnings
from medad.ct.voxels import Sink

POSITION_TOLERANCE = 0.05
"""Largest distance of a slice from the regular grid, in slice spacings. Positions are rounded decimal strings."""

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference between two slices' direction cosines."""

_SERIES, _MODALITY, _PATIENT = "0020|000e", "0008|0060", "0010|0020"
_POSITION, _ORIENTATION, _PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
_THICKNESS, _BETWEEN = "0018|0050", "0018|0088"
_SLOPE, _INTERCEPT, _BITS = "0028|1053", "0028|1052", "0028|0100"
_UNDEFINED_LENGTH = 0xFFFFFFFF  # compressed frames follow, each with its own length
_KNOWN_MODALITIES = frozenset({"MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "SEG", "RTSTRUCT", "RTDOSE", "OT", "SR"})
_ANONYMOUS_IDS = frozenset(
    {"", "0", "anon", "anonymous", "anonymized", "anonymised", "deidentified", "none", "unknown"}
)
"""Values that anonymisers write into the PatientID of all patients."""
_OTHER_ENDINGS = frozenset({".txt", ".xml", ".json", ".md", ".csv", ".pdf", ".ini", ".db", ".html"})


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    series: str
    size: tuple[int, int]  # columns, rows
    orientation: NDArray[np.float64]  # row direction, column direction
    position: NDArray[np.float64]
    spacing: tuple[float, float]  # along a row, along a column
    thickness: float | None
    bytes_per_pixel: int


def read_dicom(folder: Path, sink: Callable[[int], Sink]) -> tuple[Sink, Geometry]:
    """Read the CT series in `folder` (not in its sub-folders) into `sink`.

    Raises
    ------
    InputError
        The folder contains no DICOM file, or a file cannot be read. The files have several series, sizes or
        orientations, or another modality. A slice is missing, or the spacing is uneven. The gantry is tilted.
        RescaleSlope is zero, negative or missing.
    """
    silence_itk_warnings()
    slices = [_inspect(path, folder) for path in series_files(folder)]
    _check_one_series(slices, folder)
    slices, affine = _ordered(slices, folder)
    columns, rows = slices[0].size
    received = sink(columns * rows * len(slices))
    for index, item in enumerate(slices):
        received.put(index * columns * rows, _pixels(item, folder))
    return received, Geometry((columns, rows, len(slices)), affine)


def series_files(folder: Path) -> list[Path]:
    """Return the files of `folder` that should be slices, sorted by name. DICOMDIR files and notes are skipped."""
    with reading(folder):
        files = sorted(path for path in folder.iterdir() if path.is_file())
    files = [
        path
        for path in files
        if not path.name.startswith(".")
        and path.suffix.lower() not in _OTHER_ENDINGS
        and path.name.upper() not in ("DICOMDIR", "VERSION", "LICENSE")
    ]
    if not files:
        raise InputError(folder, "no DICOM file directly in this folder")
    return files


def patient_id(folder: Path) -> str | None:
    """Return the PatientID of a series. It may be a name: the caller must hash it at once and never show or store it.

    None: the tag is missing or empty, contains a value that anonymisers write for all patients, or the file cannot be
    read. Reading the scan then reports the error. Only one file is read, because a series belongs to one patient.
    """
    silence_itk_warnings()
    try:
        reader = _reader(series_files(folder)[0])
        reader.ReadImageInformation()
    except (InputError, OSError, RuntimeError):
        return None
    found: str = reader.GetMetaData(_PATIENT).strip("\0 ") if reader.HasMetaDataKey(_PATIENT) else ""
    return None if re.sub(r"[\W_]", "", found.casefold()) in _ANONYMOUS_IDS else found


def _reader(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _inspect(path: Path, folder: Path) -> _Slice:
    if path.stat().st_size == 0:
        raise InputError(path, "the file is empty")
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise InputError(path, "not a readable DICOM image") from None  # the original error quotes tags

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip("\0 ") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int, what: str) -> NDArray[np.float64]:
        try:
            values = np.array([float(part) for part in text(tag).split("\\")])
        except ValueError:
            values = np.empty(0)
        if values.size != count or not np.isfinite(values).all():
            raise InputError(path, f"{what} of the DICOM slice is missing or invalid")
        return values

    modality = text(_MODALITY)
    if modality not in ("CT", ""):
        found = f", found {modality}" if modality in _KNOWN_MODALITIES else ""
        raise InputError(path, f"expected modality CT{found}")
    if reader.GetNumberOfComponents() != 1:
        raise InputError(path, "a colour image; expected CT")
    columns, rows, *more = reader.GetSize()
    if any(n != 1 for n in more):
        raise InputError(path, "multi-frame DICOM; expected one file per slice")
    slope = numbers(_SLOPE, 1, "RescaleSlope")[0]
    numbers(_INTERCEPT, 1, "RescaleIntercept")
    if slope <= 0:
        raise InputError(path, f"wrong rescale slope: RescaleSlope must be above 0, found {slope:g}")
    spacing = numbers(_PIXEL_SPACING, 2, "PixelSpacing")
    if (spacing <= 0).any():
        raise InputError(path, f"voxel size must be above 0 mm, found PixelSpacing {spacing[0]:g} x {spacing[1]:g}")
    thickness = text(_BETWEEN) or text(_THICKNESS)
    try:
        depth = abs(float(thickness)) if thickness else None
    except ValueError:
        depth = None
    return _Slice(
        path=path,
        series=text(_SERIES),
        size=(columns, rows),
        orientation=numbers(_ORIENTATION, 6, "ImageOrientationPatient").reshape(2, 3),
        position=numbers(_POSITION, 3, "ImagePositionPatient"),
        spacing=(float(spacing[1]), float(spacing[0])),  # PixelSpacing is (between rows, between columns)
        thickness=depth,
        bytes_per_pixel=2 if text(_BITS) == "16" else 1,
    )


def _check_one_series(slices: list[_Slice], folder: Path) -> None:
    counts = Counter(item.series for item in slices)
    if len(counts) > 1:
        sizes = " + ".join(str(count) for count in sorted(counts.values(), reverse=True))
        raise InputError(folder, f"mixed series: {len(counts)} series in one folder ({sizes} files); separate them")
    first = slices[0]
    for item in slices[1:]:
        if item.size != first.size:
            raise InputError(folder, f"mixed series: slices of {first.size} and of {item.size} pixels; separate them")
        if np.abs(item.orientation - first.orientation).max() > ORIENTATION_TOLERANCE:
            raise InputError(folder, "mixed series: slices of different orientation; separate them")
        if not np.allclose(item.spacing, first.spacing, rtol=1e-3):
            raise InputError(folder, "mixed series: slices of different pixel spacing; separate them")


def _ordered(slices: list[_Slice], folder: Path) -> tuple[list[_Slice], NDArray[np.float64]]:
    """Return the slices in ascending order along the normal, and the affine to RAS mm."""
    row, column = slices[0].orientation
    normal = np.cross(row, column)
    slices = sorted(slices, key=lambda item: float(item.position @ normal))
    step = _slice_step(slices, normal, folder)
    affine = np.eye(4)
    affine[:3, 0] = row * slices[0].spacing[0]
    affine[:3, 1] = column * slices[0].spacing[1]
    affine[:3, 2] = step
    affine[:3, 3] = slices[0].position
    affine[:2] *= -1  # DICOM's patient axes are LPS
    affine += 0.0
    check_affine(affine, folder)
    return slices, affine


def _slice_step(slices: list[_Slice], normal: NDArray[np.float64], folder: Path) -> NDArray[np.float64]:
    if len(slices) == 1:
        thickness = slices[0].thickness
        if thickness is None or not (math.isfinite(thickness) and thickness > 0):
            raise InputError(folder, "voxel size must be above 0 mm: the only slice has no valid SliceThickness")
        return normal * thickness
    positions = np.array([item.position for item in slices])
    along = positions @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if gaps.min() <= POSITION_TOLERANCE * max(usual, 1e-3):
        raise InputError(folder, "two slices have the same position; the folder may contain several series or phases")
    widest = int(gaps.argmax())
    if gaps[widest] > 1.5 * usual:
        raise InputError(
            folder,
            f"missing slice: {gaps[widest]:.4g} mm between slices {widest + 1} and {widest + 2} of {len(slices)}, "
            f"elsewhere {usual:.4g} mm",
        )
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(slices) - 1)
    regular = positions[0] + np.arange(len(slices))[:, None] * step
    off = float(np.linalg.norm(positions - regular, axis=1).max()) / float(np.linalg.norm(step))
    if off > POSITION_TOLERANCE:
        raise InputError(
            folder, f"uneven slice spacing: from {gaps.min():.4g} to {gaps.max():.4g} mm; resample the scan first"
        )
    return step


def _holds_pixels(item: _Slice) -> bool:
    """Return whether a PixelData element is compressed or long enough. GDCM silently fills up one that is too short.

    Every byte sequence that looks like the element's head counts, because an icon before the image has one too. A
    random match can therefore only make the check less strict.
    """
    content = item.path.read_bytes()
    needed = item.size[0] * item.size[1] * item.bytes_per_pixel
    heads = [match.end() for match in re.finditer(rb"\xe0\x7f\x10\x00(?:O[BW]\0\0)?", content)]
    lengths = [(end + 4, int.from_bytes(content[end : end + 4], "little")) for end in heads]
    return not lengths or any(
        length == _UNDEFINED_LENGTH or needed <= length <= len(content) - start for start, length in lengths
    )


def _pixels(item: _Slice, folder: Path) -> NDArray[np.generic]:
    if not _holds_pixels(item):
        raise InputError(item.path, "DICOM pixels cannot be decoded: there are fewer pixels than rows x columns")
    try:
        image = _reader(item.path).Execute()
    except RuntimeError:
        raise InputError(item.path, "DICOM pixels cannot be decoded; the file is cut short or damaged") from None
    pixels: NDArray[np.generic] = sitk.GetArrayFromImage(image).reshape(-1)
    if pixels.size != item.size[0] * item.size[1]:
        raise InputError(item.path, "the number of DICOM pixels does not match the header's rows and columns")
    return pixels


def write_dicom(folder: Path, hu: NDArray[np.floating], affine: NDArray[np.float64]) -> None:
    """Write a CT series without patient data into an existing empty folder, one file per slice.

    Equal content gives equal DICOM identifiers.

    Parameters
    ----------
    hu
        Shape (columns, rows, slices). Values are rounded to whole HU, -32768..32767.
    affine
        4 x 4, voxel -> RAS mm, without shear.
    """
    check_affine(affine, folder)
    digest = hashlib.sha256(np.ascontiguousarray(hu).tobytes() + affine.tobytes()).digest()
    root = f"2.25.{int.from_bytes(digest[:12], 'big')}"  # UIDs made from a number: DICOM PS3.5, annex B.2
    lps = affine.copy()
    lps[:2] *= -1
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    series_tags = {
        _MODALITY: "CT",
        _SERIES: f"{root}.1",
        "0020|000d": root,  # study
        "0020|0052": f"{root}.2",  # frame of reference
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2",  # CT image storage
        _ORIENTATION: _decimals(axes[:, :2].T.ravel()),
        _THICKNESS: _decimals(spacing[2:]),
        _SLOPE: "1",
        _INTERCEPT: "0",
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    silence_itk_warnings()
    for index in range(hu.shape[2]):
        image = sitk.GetImageFromArray(np.rint(hu[:, :, index].T)[None].astype(np.int16))
        image.SetSpacing([float(value) for value in spacing])
        slice_tags = {
            _POSITION: _decimals(lps[:3, :3] @ [0, 0, index] + lps[:3, 3]),
            "0020|0013": str(index + 1),
            "0008|0018": f"{root}.3.{index + 1}",
        }
        for tag, value in (series_tags | slice_tags).items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"slice{index + 1:04d}.dcm"))
        writer.Execute(image)


def _decimals(values: NDArray[np.float64]) -> str:
    """Format values as DICOM decimal strings, which have at most 16 characters."""
    return "\\".join(f"{value:.9g}" for value in values)
