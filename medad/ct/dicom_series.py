"""The CT series of a DICOM export. Localizers, other modalities, reports and other files are counted and passed over.

Descriptions of series are free text. They are for the user's own terminal and nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydicom.uid import UID

from medad.base.errors import InputError
from medad.ct.dicom_files import DicomFile, Export, Header, is_index, is_zip, list_export, list_siblings, read_header
from medad.ct.dicom_planes import (
    DESCRIPTION,
    HEADER_TAGS,
    IMAGE_TYPE,
    KERNEL,
    MODALITY,
    PATIENT,
    PATIENT_NAME,
    PER_FRAME,
    PHASE_TAGS,
    POSITION,
    SERIES,
    SERIES_NUMBER,
    SOP_CLASS,
    STUDY,
    Plane,
    planes_of,
)

CT_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})
"""CT Image Storage, Enhanced CT Image Storage and Legacy Converted Enhanced CT Image Storage (PS3.4, annex B.5)."""
_MEDIA_CLASS = 0x00020002
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_KINDS = {
    "RTSTRUCT": "RT structure set",
    "RTDOSE": "RT dose",
    "RTPLAN": "RT plan",
    "SEG": "segmentation",
    "SR": "structured report",
    "PR": "presentation state",
    "KO": "key object note",
    "DOC": "document",
}
_IMAGES = frozenset({"MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SC", "ES"})
MODALITIES = frozenset(_KINDS) | _IMAGES
"""Modalities that a message may name. Another value could be any text."""
SINGLE_IMAGES = 3
"""Largest number of images of a series that is passed over if another one is a volume: scouts without a flag."""
VOLUME_IMAGES = 10
MAX_PHASES = 12


@dataclass(frozen=True, eq=False)
class Series:
    """A CT series, or one phase of it."""

    key: str
    """Beginning of a digest of its identifier, 8 hexadecimal digits."""
    planes: tuple[Plane, ...]
    number: str
    description: str
    """Free text, for the user's terminal only."""
    kernel: str
    phase: str
    """Number of the phase if the series has several, else empty."""
    patient: str
    """Digest of the patient's identifiers."""

    @property
    def files(self) -> tuple[DicomFile, ...]:
        return tuple(sorted({plane.file for plane in self.planes}))

    @property
    def thickness_mm(self) -> float | None:
        return self.planes[0].thickness

    @property
    def row(self) -> dict[str, str]:
        """Return the series as a row of a table for the user's terminal."""
        columns, rows = self.planes[0].size
        thickness = "" if self.thickness_mm is None else f"{self.thickness_mm:g}"
        return {
            "series": self.key,
            "number": self.number,
            "description": self.description,
            "phase": self.phase,
            "kernel": self.kernel,
            "thickness mm": thickness,
            "slices": str(len(self.planes)),
            "pixels": f"{columns} x {rows}",
        }


@dataclass(frozen=True)
class FoundSeries:
    """The CT series of an export, and the number of passed-over files by kind."""

    series: tuple[Series, ...]
    passed_over: Counter[str]
    phases: bool
    """Whether one series was split into several phases."""

    @property
    def note(self) -> str | None:
        """Return a sentence about what was passed over. None: nothing."""
        if not self.passed_over:
            return None
        parts = [f"{count} {kind}" for kind, count in sorted(self.passed_over.items())]
        return f"files that are not slices of this CT were passed over: {', '.join(parts)}"


def count_word(number: int) -> str:
    """Return a small number as a word."""
    return {2: "two", 3: "three", 4: "four"}.get(number, str(number))


def find_series(base: Path) -> FoundSeries:
    """Return the CT series of an export, in the order of their numbers.

    Localizers, other modalities, reports and other files are counted and passed over.

    Raises
    ------
    InputError
        The export has no CT series. A file is damaged, or could be a slice that is missing then. A series is of several
        patients.
    """
    one_file = base.is_file() and not is_zip(base) and not is_index(base)
    export = Export(tuple(DicomFile(path) for path in list_siblings(base))) if one_file else list_export(base)
    other = Counter(export.other)
    groups: dict[str, list[tuple[DicomFile, Header]]] = {}
    strangers: list[DicomFile] = []
    images_of_others: dict[str, tuple[DicomFile, str]] = {}
    for file in export.files:
        header = read_header(file, HEADER_TAGS)
        if header is None:
            strangers.append(file)
            continue
        kind = _kind(header, file)
        if kind == "CT":
            groups.setdefault(header.text(SERIES), []).append((file, header))
        else:
            other[kind] += 1
            modality = header.text(MODALITY)
            if kind != "localizer" and modality != "CT":
                images_of_others.setdefault(header.text(SERIES), (file, modality))
    if not groups:
        _raise_no_ct(base, strangers, images_of_others)
    for uid in groups:
        if uid in images_of_others:
            # one slice with another modality: without it, the volume would be shorter
            raise _wrong_modality(*images_of_others[uid])
    _check_strangers(strangers, groups)
    other["file that is not DICOM"] += len(strangers)
    series: list[Series] = []
    phases = False
    for uid, members in groups.items():
        parts = _series(uid, members, base)
        phases |= len(parts) > 1
        series += parts
    largest = max(len(each.planes) for each in series)
    if largest >= VOLUME_IMAGES:
        small = [each for each in series if len(each.planes) <= SINGLE_IMAGES]
        other["single image"] += sum(len(each.planes) for each in small)
        series = [each for each in series if len(each.planes) > SINGLE_IMAGES]
    series.sort(key=lambda each: (len(each.number), each.number, each.phase, each.key))
    phases = phases and len(groups) == 1
    return FoundSeries(tuple(series), +other, phases)


def _kind(header: Header, file: DicomFile) -> str:
    """Return `CT` for an image of a CT, else the kind of what is passed over."""
    sop_class = header.text(SOP_CLASS) or header.meta(_MEDIA_CLASS)
    if sop_class == _DIRECTORY_CLASS:
        return "index or note"
    modality, image_type = header.text(MODALITY), header.text(IMAGE_TYPE).upper()
    if modality not in ("CT", ""):
        return _KINDS.get(modality) or (f"{modality} image" if modality in _IMAGES else "object of another modality")
    if sop_class and sop_class not in CT_CLASSES:
        if UID(sop_class).name == sop_class:
            raise InputError(file.path, "not a readable DICOM image: its SOP class is unknown, or it is cut short")
        return "screen save or report"
    if "LOCALIZER" in image_type or "SCOUT" in image_type:
        return "localizer"
    if not header.raw(POSITION) and PER_FRAME not in header.data and re.search("SECONDARY|SCREEN|REPORT", image_type):
        return "screen save or report"
    return "CT"


def _raise_no_ct(base: Path, strangers: list[DicomFile], others: dict[str, tuple[DicomFile, str]]) -> None:
    for file in strangers:
        if re.search(r"\.(dcm|ima|dicom)$", file.name.lower()):
            raise _not_dicom(file)
    for file, modality in others.values():
        raise _wrong_modality(file, modality)
    raise InputError(base, "no CT series in this folder or its sub-folders")


def _wrong_modality(file: DicomFile, modality: str) -> InputError:
    found = f", found {modality}" if modality in MODALITIES else ""
    return InputError(file.path, f"expected modality CT{found}")


def _not_dicom(file: DicomFile) -> InputError:
    with file.open() as stream:
        empty = not stream.read(1)
    return InputError(file.path, "the file is empty" if empty else "not a readable DICOM image")


def _shape_of(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _check_strangers(strangers: Iterable[DicomFile], groups: dict[str, list[tuple[DicomFile, Header]]]) -> None:
    """Raise InputError if a file that is not DICOM is named as a slice. Without it, the volume would be shorter."""
    names = {_shape_of(file.name) for members in groups.values() for file, _ in members}
    for file in strangers:
        if _shape_of(file.name) in names or re.search(r"\.(dcm|ima|dicom)$", file.name.lower()):
            raise _not_dicom(file)


def _series(uid: str, members: list[tuple[DicomFile, Header]], base: Path) -> list[Series]:
    """Return a series, or its phases."""
    patients = {(h.text(STUDY), _identity(h)) for _, h in members}
    if len({patient for _, patient in patients}) > 1:
        raise InputError(base, f"{count_word(len({p for _, p in patients}))} patients in one series; separate them")
    if len(patients) > 1:
        raise InputError(base, f"{count_word(len(patients))} studies in one series; separate them")
    planes = tuple(plane for file, header in members for plane in planes_of(file, header))
    first = members[0][1]
    one = Series(
        key=_digest(uid),
        planes=planes,
        number=first.text(SERIES_NUMBER),
        description=_readable(first.raw(DESCRIPTION)),
        kernel=_readable(first.raw(KERNEL)),
        phase="",
        patient=_digest(_identity(first)),
    )
    parts = _phases(planes)
    return (
        [one]
        if len(parts) == 1
        else [
            replace(one, key=_digest(f"{uid}#{index}"), planes=part, phase=str(index))
            for index, part in enumerate(parts, start=1)
        ]
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _readable(value: bytes) -> str:
    text = value.decode("utf-8", "replace").strip("\0 ")
    return "".join(each if each.isprintable() else " " for each in text)


def _identity(header: Header) -> str:
    """Return a patient's id and name, without differences of writing."""
    values = header.text(PATIENT), re.sub(r"[\W_]", "", header.text(PATIENT_NAME).casefold())
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _phases(planes: tuple[Plane, ...]) -> list[tuple[Plane, ...]]:
    """Return the phases of a series: groups of images that cover the same part of the body."""
    normal = np.cross(*planes[0].orientation)
    along = {id(plane): float(plane.position @ normal) for plane in planes}
    for index in range(len(PHASE_TAGS)):
        parts: dict[str, list[Plane]] = {}
        for plane in planes:
            parts.setdefault(plane.phases[index], []).append(plane)
        if _overlap(list(parts.values()), along):
            return [tuple(part) for _, part in sorted(parts.items(), key=lambda item: (len(item[0]), item[0]))]
    sweeps = _sweeps(planes, along)
    return [tuple(part) for part in sweeps] if _overlap(sweeps, along) else [planes]


def _sweeps(planes: tuple[Plane, ...], along: dict[int, float]) -> list[list[Plane]]:
    """Return the images in the order of their numbers, cut where the position jumps back."""
    numbers = [plane.number for plane in planes]
    if None in numbers or len(set(numbers)) < len(numbers):
        return [list(planes)]
    ordered = sorted(planes, key=lambda plane: plane.number or 0)
    steps = np.diff([along[id(plane)] for plane in ordered])
    usual = np.median(steps)
    parts = [[ordered[0]]]
    for plane, step in zip(ordered[1:], steps, strict=True):
        if step * usual < 0:
            parts.append([])
        parts[-1].append(plane)
    return parts


def _overlap(parts: Sequence[Sequence[Plane]], along: dict[int, float]) -> bool:
    """Return whether these are phases: a few groups of several images, of which two cover half of the same range."""
    if not 2 <= len(parts) <= MAX_PHASES or min(len(part) for part in parts) < 2:
        return False
    ranges = [(min(values), max(values)) for part in parts for values in [[along[id(plane)] for plane in part]]]
    for index, (low, high) in enumerate(ranges):
        for other_low, other_high in ranges[:index]:
            common = min(high, other_high) - max(low, other_low)
            if common > 0.5 * min(high - low, other_high - other_low) > 0:
                return True
    return False
