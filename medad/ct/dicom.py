"""Reading of a CT series: its slices in their order in space, and their pixels as HU.

Slices are ordered and placed by their positions, not by file name or instance number. No message shows the content of a
tag, because names, numbers and free text may identify a patient.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID

from medad.base.errors import InputError
from medad.ct.dicom_choice import SeveralSeriesError, choose_series
from medad.ct.dicom_files import Header, read_whole
from medad.ct.dicom_planes import Plane
from medad.ct.dicom_series import Series
from medad.ct.geometry import Geometry, check_affine
from medad.ct.itk import silence_itk_warnings
from medad.ct.voxels import SinkT

POSITION_TOLERANCE = 0.05
"""Largest distance of a slice from the regular grid, in slice spacings. Positions are rounded decimal strings."""

POSITION_ROUNDING_MM = 0.06
"""Largest distance of a slice from the regular grid, mm, if positions are rounded to 0.1 mm, as some exports do."""

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference between two slices' direction cosines."""

PARALLEL_TOLERANCE = 1e-3
"""Largest sine of the angle between the slices' normal and their direction. A larger one is a gantry tilt."""

AIR_HU = -1024.0
PADDING_ABOVE_HU = 3100.0
"""HU above which a padding value is replaced by air. A padding value below is as dark as air or darker."""
IMPOSSIBLE_BELOW_HU = -1100.0
"""A slice whose values are all below this was decoded with too few bits."""

_UNCOMPRESSED = {
    "1.2.840.10008.1.2": "<",
    "1.2.840.10008.1.2.1": "<",
    "1.2.840.10008.1.2.1.98": "<",
    "1.2.840.10008.1.2.1.99": "<",
    "1.2.840.10008.1.2.2": ">",
}
"""Transfer syntaxes whose pixels are plain numbers, with their byte order."""
_OTHER_UNITS = frozenset({"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"})
"""Values of RescaleType for maps that are not HU: optical density, iodine, atomic number, electrons, percent."""
_PIXELS, _FLOAT_PIXELS = 0x7FE00010, (0x7FE00008, 0x7FE00009)
_BITS_ALLOCATED, _BITS_STORED, _SIGNED, _PADDING = 0x00280100, 0x00280101, 0x00280103, 0x00280120


def read_dicom(path: Path, sink: Callable[[int], SinkT]) -> tuple[SinkT, Geometry, list[str]]:
    """Read the CT series of `path` into `sink`. Return it with the grid and notes on what was assumed.

    Raises
    ------
    SeveralSeriesError
        There are several CT series, or several phases in one.
    InputError
        The export has no CT series, or a file cannot be read. The slices have several sizes or orientations. A slice is
        missing, or the spacing is uneven. The gantry is tilted. The values are not HU.
    """
    series, found = choose_series(path)
    base = series.planes[0].file.path.parent if path.is_file() else path
    notes = [] if found.note is None else [found.note]
    planes = list(series.planes)
    _check_alike(planes, base)
    notes += _check_rescale(planes, base)
    planes = _without_duplicates(planes, base, notes)
    planes, affine = _ordered(planes, base, notes)
    columns, rows = planes[0].size
    received = sink(columns * rows * len(planes))
    decoder = Decoder()
    places = {id(plane): index for index, plane in enumerate(planes)}
    for _, members in itertools.groupby(sorted(planes, key=lambda plane: plane.file), key=lambda plane: plane.file):
        group = list(members)
        data = read_whole(group[0].file)
        for plane in group:
            received.put(places[id(plane)] * columns * rows, decoder.hu(data, plane))
    return received, Geometry((columns, rows, len(planes)), affine), notes + decoder.notes()


def series_geometry(series: Series, path: Path) -> Geometry:
    """Return the grid of a series. No pixels are read. Raises InputError."""
    planes = list(series.planes)
    _check_alike(planes, path)
    planes, affine = _ordered(planes, path, [])
    return Geometry((*planes[0].size, len(planes)), affine)


def _check_alike(planes: list[Plane], base: Path) -> None:
    first = planes[0]
    for item in planes[1:]:
        if item.size != first.size:
            raise InputError(base, f"mixed series: slices of {first.size} and of {item.size} pixels; separate them")
        if np.abs(item.orientation - first.orientation).max() > ORIENTATION_TOLERANCE:
            raise InputError(base, "mixed series: slices of different orientation; separate them")
        if not np.allclose(item.spacing, first.spacing, rtol=1e-3):
            raise InputError(base, "mixed series: slices of different pixel spacing; separate them")


def _check_rescale(planes: list[Plane], base: Path) -> list[str]:
    """Return notes on the scale of the values. Raises InputError if they are known not to be HU."""
    without = [plane for plane in planes if plane.rescale is None]
    if without and len(without) < len(planes):
        raise InputError(without[0].file.path, "RescaleSlope of the DICOM slice is missing or invalid")
    notes = ["the slices have no RescaleSlope; their values were taken as HU"] if without else []
    kinds = {plane.rescale_type.upper() for plane in planes} - {"", "HU"}
    if kinds & _OTHER_UNITS:
        raise InputError(base, f"not HU: RescaleType is {min(kinds & _OTHER_UNITS)}, a map of something else")
    if kinds:
        notes.append("RescaleType is not HU; the values were taken as HU")
    return notes


def _without_duplicates(planes: list[Plane], base: Path, notes: list[str]) -> list[Plane]:
    """Return the planes without those that occur twice with equal pixels.

    Raises SeveralSeriesError if their pixels differ.
    """
    normal = np.cross(*planes[0].orientation)
    by_place: dict[tuple[int, ...], list[Plane]] = {}
    for plane in sorted(planes, key=lambda plane: (plane.file, plane.frame)):
        place = (float(plane.position @ normal), *(float(value) for value in plane.position))
        by_place.setdefault(tuple(round(1000 * value) for value in place), []).append(plane)
    if len(by_place) == len(planes):
        return planes
    for same in by_place.values():
        if len({_pixel_digest(plane) for plane in same}) > 1:
            double = sum(len(each) > 1 for each in by_place.values())
            raise SeveralSeriesError(
                base,
                f"two phases in one series: {double} slices have the same position and other pixels; separate them",
            )
    notes.append(f"slices that occur twice with equal pixels were passed over: {len(planes) - len(by_place)}")
    return [same[0] for same in by_place.values()]


def _pixel_digest(plane: Plane) -> str:
    pixels = Decoder().hu(read_whole(plane.file), plane)
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _ordered(planes: list[Plane], base: Path, notes: list[str]) -> tuple[list[Plane], NDArray[np.float64]]:
    """Return the slices in ascending order along the normal, and the affine to RAS mm."""
    row, column = planes[0].orientation
    normal = np.cross(row, column)
    planes = sorted(planes, key=lambda item: float(item.position @ normal))
    origin, step = _grid(planes, normal, base, notes)
    affine = np.eye(4)
    affine[:3, 0] = row * planes[0].spacing[0]
    affine[:3, 1] = column * planes[0].spacing[1]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    affine[:2] *= -1  # DICOM's patient axes are LPS
    affine += 0.0
    check_affine(affine, base)
    return planes, affine


def _grid(
    planes: list[Plane], normal: NDArray[np.float64], base: Path, notes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the position of the first slice, and the step to the next one. Raises InputError."""
    first = planes[0].position
    if len(planes) == 1:
        thickness = planes[0].thickness
        if thickness is None:
            raise InputError(base, "voxel size must be above 0 mm: the only slice has no valid SliceThickness")
        return first, normal * thickness
    positions = np.array([item.position for item in planes])
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    widest = int(gaps.argmax())
    if gaps[widest] > 1.5 * usual and gaps[widest] > usual + 2 * POSITION_ROUNDING_MM:
        raise InputError(
            base,
            f"missing slice: {gaps[widest]:.4g} mm between slices {widest + 1} and {widest + 2} of {len(planes)}, "
            f"elsewhere {usual:.4g} mm",
        )
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(planes) - 1)
    sine = float(np.linalg.norm(np.cross(normal, step)) / np.linalg.norm(step))
    if sine > PARALLEL_TOLERANCE:
        angle = math.degrees(math.asin(min(1.0, sine)))
        raise InputError(
            base,
            f"gantry tilt of {angle:.1f} degrees: the slices are sheared against each other; resample the scan first",
        )
    if _distance(positions, first, step) <= POSITION_TOLERANCE * np.linalg.norm(step):
        return first, step
    rounded = _rounded_grid(planes, positions, normal)
    if rounded is None:
        raise InputError(
            base, f"uneven slice spacing: from {gaps.min():.4g} to {gaps.max():.4g} mm; resample the scan first"
        )
    length = float(np.linalg.norm(rounded[1]))
    notes.append(f"the positions of the slices are rounded to 0.1 mm; a spacing of {length:.4g} mm was taken")
    return rounded


def _distance(positions: NDArray[np.float64], first: NDArray[np.float64], step: NDArray[np.float64]) -> float:
    """Return the largest distance of a slice from a regular grid, mm."""
    regular = first + np.arange(len(positions))[:, None] * step
    return float(np.linalg.norm(positions - regular, axis=1).max())


def _rounded_grid(
    planes: list[Plane], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the grid of positions that were rounded to 0.1 mm: the header's spacing if it fits, else the mean one."""
    if np.abs(positions * 10 - np.rint(positions * 10)).max() > 1e-3:
        return None
    index = np.arange(len(planes))
    steps = [normal * thickness for thickness in [planes[0].thickness] if thickness is not None]
    steps.append(normal * float(np.polyfit(index, positions @ normal, 1)[0]))
    for step in steps:
        first = np.mean(positions - index[:, None] * step, axis=0)
        if _distance(positions, first, step) <= POSITION_ROUNDING_MM * math.sqrt(3):
            return first, step
    return None


@dataclass
class Decoder:
    """Decoder of pixels to HU. It counts what it had to assume."""

    assumed: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """Return a sentence for each assumption, with the number of slices."""
        return [f"{what} (slices: {count})" for what, count in sorted(self.assumed.items())]

    def hu(self, data: Header, plane: Plane) -> NDArray[np.generic]:
        """Return the HU of one image of a file, flat. Raises InputError."""
        stored = self._stored(data, plane)
        slope, intercept = plane.rescale or (1.0, 0.0)
        if (slope, intercept) == (1.0, 0.0):
            hu: NDArray[np.generic] = stored
        elif slope == 1.0 and intercept == int(intercept) and abs(intercept) < 1 << 24:
            hu = stored.astype(np.int64) + int(intercept)
        else:
            hu = stored * slope + intercept
        padding = _padding(data)
        if padding is not None and padding * slope + intercept > PADDING_ABOVE_HU:
            there = stored == padding
            if there.any():
                hu = np.where(there, AIR_HU, hu)
                self.assumed["padding was taken as air"] += 1
        return hu

    def _stored(self, data: Header, plane: Plane) -> NDArray[np.integer]:
        """Return the stored values of an image, flat."""
        path, (columns, rows) = plane.file.path, plane.size
        if any(tag in data.data for tag in _FLOAT_PIXELS):
            raise InputError(path, "DICOM pixels cannot be decoded: they are floating-point numbers")
        allocated, stored_bits = data.integer(_BITS_ALLOCATED) or 16, data.integer(_BITS_STORED) or 16
        if allocated not in (8, 16, 32) or not 1 <= stored_bits <= allocated:
            raise InputError(path, f"DICOM pixels cannot be decoded: {stored_bits} of {allocated} bits are stored")
        syntax = data.transfer_syntax
        if syntax not in _UNCOMPRESSED:
            return _decompressed(data, plane, syntax, allocated, stored_bits)
        signed = bool(data.integer(_SIGNED))
        content = data.raw(_PIXELS)
        kind = f"{_UNCOMPRESSED[syntax]}{'i' if signed else 'u'}{allocated // 8}"
        count, size = columns * rows, columns * rows * allocated // 8
        part = content[plane.frame * size : (plane.frame + 1) * size]
        if len(part) < size:
            raise InputError(path, "DICOM pixels cannot be decoded: there are fewer pixels than rows x columns")
        values: NDArray[np.integer] = np.frombuffer(part, kind, count).astype(np.int64 if allocated == 32 else np.int32)
        return self._masked(values, plane, allocated, stored_bits, signed=signed)

    def _masked(
        self, values: NDArray[np.integer], plane: Plane, allocated: int, stored_bits: int, *, signed: bool
    ) -> NDArray[np.integer]:
        """Return the values without the bits above those stored, which old consoles use for overlays.

        Some anonymisers write too few stored bits. Then the masked values are below any HU, and all bits are values.
        """
        if stored_bits == allocated:
            return values
        span = 1 << stored_bits
        masked = values & (span - 1)
        if signed:
            masked = np.where(masked >= span // 2, masked - span, masked)
        if np.array_equal(masked, values):
            return values
        slope, intercept = plane.rescale or (1.0, 0.0)
        if masked.max() * slope + intercept < IMPOSSIBLE_BELOW_HU <= values.max() * slope + intercept:
            self.assumed[f"values have more than the {stored_bits} bits of the header, and all were read"] += 1
            return values
        return masked


def _padding(data: Header) -> float | None:
    """Return the stored value that fills the image outside of the scanned circle."""
    raw = data.raw(_PADDING)
    if len(raw) < 2:
        return None
    order = _UNCOMPRESSED.get(data.transfer_syntax, "<")
    return float(np.frombuffer(raw[:2], f"{order}{'i' if data.integer(_SIGNED) else 'u'}2")[0])


def _decompressed(data: Header, plane: Plane, syntax: str, allocated: int, stored_bits: int) -> NDArray[np.integer]:
    """Return the stored values of a compressed image, flat, decoded by GDCM or else by a decoder of pydicom.

    GDCM reads a file with the pixels alone. It neither inverts MONOCHROME1 then, nor stops at a wrong geometry.
    """
    path, (columns, rows) = plane.file.path, plane.size
    name = UID(syntax).name
    shown = syntax if name == syntax or not name.isprintable() else f"{name}, {syntax}"
    if not UID(syntax).is_valid:
        raise InputError(path, "DICOM pixels cannot be decoded: the transfer syntax is missing or invalid")
    try:
        frame = get_frame(data.raw(_PIXELS), plane.frame, number_of_frames=_frame_count(data))
        bare = _bare(frame, data, plane, syntax, allocated, stored_bits)
        try:
            values = _by_gdcm(bare)
        except RuntimeError:
            values = bare.pixel_array.reshape(-1)
    except Exception:
        rule = f"DICOM pixels cannot be decoded (transfer syntax {shown}); decompress the files first"
        raise InputError(path, rule) from None  # the original error quotes tags
    if values.size != columns * rows:
        raise InputError(path, "the number of DICOM pixels does not match the header's rows and columns")
    return values.astype(np.int32)


def _by_gdcm(bare: Dataset) -> NDArray[np.integer]:
    """Return the pixels of a slice, flat. Raises RuntimeError if GDCM cannot decode them."""
    silence_itk_warnings()
    with tempfile.TemporaryDirectory(prefix="adflows-dicom-") as folder:
        target = Path(folder) / "slice.dcm"
        bare.save_as(target, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(target))
        values: NDArray[np.integer] = sitk.GetArrayFromImage(reader.Execute()).reshape(-1)
    return values


def _frame_count(data: Header) -> int:
    return max(1, int(next(iter(data.numbers(0x00280008)), 1)))


def _bare(frame: bytes, data: Header, plane: Plane, syntax: str, allocated: int, stored_bits: int) -> pydicom.Dataset:
    """Return a slice with these compressed pixels and nothing else of the original."""
    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.MediaStorageSOPClassUID = bare.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    bare.file_meta.MediaStorageSOPInstanceUID = bare.SOPInstanceUID = "2.25.1"
    bare.file_meta.TransferSyntaxUID = UID(syntax)
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    bare.Columns, bare.Rows = plane.size
    bare.BitsAllocated, bare.BitsStored, bare.HighBit = allocated, stored_bits, stored_bits - 1
    bare.PixelRepresentation = data.integer(_SIGNED) or 0
    bare.PixelData = encapsulate([frame])
    bare["PixelData"].VR = "OB"
    bare["PixelData"].is_undefined_length = True
    return bare
