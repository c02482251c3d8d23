"""The images of a CT series: the values of a slice's header, or of a frame's functional groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.ct.dicom_files import DicomFile, Header

SOP_CLASS, MODALITY, IMAGE_TYPE = 0x00080016, 0x00080060, 0x00080008
STUDY, SERIES, SERIES_NUMBER, DESCRIPTION = 0x0020000D, 0x0020000E, 0x00200011, 0x0008103E
PATIENT, PATIENT_NAME = 0x00100020, 0x00100010
POSITION, _ORIENTATION, _PIXEL_SPACING = 0x00200032, 0x00200037, 0x00280030
_THICKNESS, _BETWEEN, KERNEL = 0x00180050, 0x00180088, 0x00181210
_ROWS, _COLUMNS, _FRAMES, _SAMPLES = 0x00280010, 0x00280011, 0x00280008, 0x00280002
_SLOPE, _INTERCEPT, _RESCALE_TYPE = 0x00281053, 0x00281052, 0x00281054
_INSTANCE, _ACQUISITION, _TEMPORAL, _TRIGGER = 0x00200013, 0x00200012, 0x00200100, 0x00181060
_SHARED, PER_FRAME = 0x52009229, 0x52009230
_MEASURES, _PLANE_ORIENTATION, _PLANE_POSITION = 0x00289110, 0x00209116, 0x00209113
_TRANSFORMATION, _FRAME_CONTENT, _FRAME_TYPE = 0x00289145, 0x00209111, 0x00189329
_FRAME_TIME, _FRAME_ACQUISITION, _FRAME_KIND = 0x00209128, 0x00209156, 0x00089007
HEADER_TAGS = (
    *(SOP_CLASS, MODALITY, IMAGE_TYPE, STUDY, SERIES, SERIES_NUMBER, DESCRIPTION, PATIENT),
    *(PATIENT_NAME, POSITION, _ORIENTATION, _PIXEL_SPACING, _THICKNESS, _BETWEEN, KERNEL, _ROWS, _COLUMNS, _FRAMES),
    *(_SAMPLES, _SLOPE, _INTERCEPT, _RESCALE_TYPE, _INSTANCE, _ACQUISITION, _TEMPORAL, _TRIGGER, _SHARED, PER_FRAME),
)
PHASE_TAGS = (_TEMPORAL, _ACQUISITION, _TRIGGER)


@dataclass(frozen=True, eq=False)
class Plane:
    """One image of a series: a file, or a frame of one."""

    file: DicomFile
    frame: int
    size: tuple[int, int]
    """Columns, rows."""
    orientation: NDArray[np.float64]
    """Direction of a row and of a column, LPS."""
    position: NDArray[np.float64]
    """Centre of the first pixel, LPS mm."""
    spacing: tuple[float, float]
    """Distance of pixels along a row and along a column, mm."""
    thickness: float | None
    """Distance to the next slice by the header, mm."""
    rescale: tuple[float, float] | None
    """Slope and intercept. None: the header has neither."""
    rescale_type: str
    number: float | None
    """Number of the image in its series."""
    phases: tuple[str, ...]
    """Values of the attributes that tell phases of a contrast agent or of the heart."""


def planes_of(file: DicomFile, header: Header) -> list[Plane]:
    """Return the images of a file. Raises InputError."""
    columns, rows = header.integer(_COLUMNS), header.integer(_ROWS)
    if not columns or not rows:
        raise InputError(file.path, "Rows and Columns of the DICOM image are missing or invalid")
    if (header.integer(_SAMPLES) or 1) != 1:
        raise InputError(file.path, "a colour image; expected CT")
    frames = header.sequence(PER_FRAME)
    count = int(next(iter(header.numbers(_FRAMES)), 1))
    if not frames and count > 1:
        raise InputError(file.path, "multi-frame DICOM without the position of each frame; export it as single slices")
    if frames and len(frames) != count:
        raise InputError(file.path, f"multi-frame DICOM with {count} frames but the positions of {len(frames)}")
    if not frames:
        return [_plane(file, 0, (columns, rows), [header], header, header)]
    shared = header.sequence(_SHARED)
    found = []
    for index, frame in enumerate(frames):
        groups = [frame, *shared]
        kind = " ".join(item.text(_FRAME_KIND) for group in groups for item in group.sequence(_FRAME_TYPE))
        if "LOCALIZER" not in kind.upper():
            found.append(_plane(file, index, (columns, rows), _items(groups), header, frame))
    if not found:
        raise InputError(file.path, "multi-frame DICOM with localizers only")
    return found


def _items(groups: list[Header]) -> list[Header]:
    macros = (_MEASURES, _PLANE_ORIENTATION, _PLANE_POSITION, _TRANSFORMATION, _FRAME_CONTENT)
    return [item for group in groups for macro in macros for item in group.sequence(macro)]


def _plane(
    file: DicomFile, index: int, size: tuple[int, int], groups: list[Header], header: Header, frame: Header
) -> Plane:
    """Create the image of a slice, or of a frame from its functional groups (PS3.3, C.7.6.16)."""

    def values(tag: int) -> list[float]:
        return next((found for group in groups if (found := group.numbers(tag))), [])

    def need(tag: int, count: int, what: str) -> NDArray[np.float64]:
        found = np.array(values(tag))
        if found.size != count or not np.isfinite(found).all():
            raise InputError(file.path, f"{what} of the DICOM slice is missing or invalid")
        return found

    position = need(POSITION, 3, "ImagePositionPatient")
    orientation = need(_ORIENTATION, 6, "ImageOrientationPatient").reshape(2, 3)
    spacing = need(_PIXEL_SPACING, 2, "PixelSpacing")
    if (spacing <= 0).any():
        raise InputError(
            file.path, f"voxel size must be above 0 mm, found PixelSpacing {spacing[0]:g} x {spacing[1]:g}"
        )
    rescale = None
    if values(_SLOPE) or values(_INTERCEPT):
        slope, intercept = need(_SLOPE, 1, "RescaleSlope")[0], need(_INTERCEPT, 1, "RescaleIntercept")[0]
        if slope <= 0:
            raise InputError(file.path, f"wrong rescale slope: RescaleSlope must be above 0, found {slope:g}")
        rescale = float(slope), float(intercept)
    between = [abs(value) for tag in (_BETWEEN, _THICKNESS) for value in values(tag)]
    if frame is header:
        number = next(iter(header.numbers(_INSTANCE)), None)
        phases = tuple(header.text(tag) for tag in PHASE_TAGS)
    else:
        number = float(index)
        content = [group for group in groups if _FRAME_TIME in group.data or _FRAME_ACQUISITION in group.data]
        of_frame = [
            "".join(str(group.integer(tag) or "") for group in content) for tag in (_FRAME_TIME, _FRAME_ACQUISITION)
        ]
        phases = (*of_frame, "")
    return Plane(
        file=file,
        frame=index,
        size=size,
        orientation=orientation,
        position=position,
        spacing=(float(spacing[1]), float(spacing[0])),  # PixelSpacing is (between rows, between columns)
        thickness=next((value for value in between if np.isfinite(value) and value > 0), None),
        rescale=rescale,
        rescale_type=next((text for group in groups if (text := group.text(_RESCALE_TYPE))), ""),
        number=number,
        phases=phases,
    )
