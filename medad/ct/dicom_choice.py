"""The choice of one CT series of a DICOM export.

A scan is a path. A folder, a zip or a DICOMDIR with exactly one CT series stands for that series, with other files
beside it or without. One file of a series stands for its series. One of several series has the path FOLDER/series-KEY,
as `series_path` makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from medad.base.errors import InputError
from medad.base.storage import lines_digest
from medad.ct.dicom_files import (
    DicomFile,
    Header,
    is_dicom,
    is_index,
    is_zip,
    list_export,
    list_files,
    list_siblings,
    read_header,
)
from medad.ct.dicom_planes import PATIENT
from medad.ct.dicom_series import FoundSeries, Series, count_word, find_series

_KEY = re.compile(r"series-([0-9a-f]{8})")
_ANONYMOUS_IDS = frozenset(
    {"", "0", "anon", "anonymous", "anonymized", "anonymised", "deidentified", "none", "unknown"}
)
"""Values that anonymisers write into the PatientID of all patients."""


class SeveralSeriesError(InputError):
    """An export with several CT series, of which none was chosen. `series` lists them."""

    def __init__(self, path: Path | str, rule: str, series: Sequence[Series] = ()) -> None:
        super().__init__(path, rule)
        self.series = tuple(series)


def series_path(base: Path, series: Series) -> Path:
    """Return the path of one series of an export."""
    return base / f"series-{series.key}"


def split_path(path: Path) -> tuple[Path, str | None]:
    """Return the export of a path, and the key of the series if the path names one."""
    match = _KEY.fullmatch(path.name)
    if match and not path.exists():
        return path.parent, match.group(1)
    return path, None


def is_series(path: Path) -> bool:
    """Return whether a path is read as DICOM: a folder, zip, DICOMDIR, DICOM file, or a series of one of them."""
    base, key = split_path(path)
    if key is not None or base.is_dir() or is_zip(base):
        return True
    return base.is_file() and (is_index(base) or is_dicom(base))


def export_files(path: Path) -> list[Path]:
    """Return the files on which the content of a series may depend. Nothing is opened. Raises InputError."""
    base, _ = split_path(path)
    if is_zip(base):
        return [base]
    if base.is_dir():
        return list_files(base)
    return list_files(base.parent) if is_index(base) else list_siblings(base)


def series_digest(path: Path) -> str:
    """Return the sha256 of a series: that of its file, or of the sorted digests of its files. Raises InputError."""
    digests = sorted(file.digest() for file in choose_series(path)[0].files)
    return digests[0] if len(digests) == 1 else lines_digest(digests)


def choose_series(path: Path) -> tuple[Series, FoundSeries]:
    """Return the series of a path, and all that were found.

    Raises
    ------
    SeveralSeriesError
        There are several CT series, or several phases in one, and the path names none.
    InputError
        The export has no CT series, or a file cannot be read.
    """
    base, key = split_path(path)
    found = find_series(base)
    if key is not None:
        for series in found.series:
            if series.key == key:
                return series, found
        raise InputError(path, "no such series in this export; `adflows liver series` lists its series")
    if base.is_file() and not is_zip(base) and not is_index(base):
        of_file = [series for series in found.series if any(plane.file.path == base for plane in series.planes)]
        if not of_file:
            raise InputError(base, "this file is not a slice of a CT series")
        found = replace(found, series=tuple(of_file))
    if len(found.series) == 1:
        return found.series[0], found
    raise SeveralSeriesError(base, _several(found), found.series)


def _several(found: FoundSeries) -> str:
    sizes = " + ".join(str(len(each.planes)) for each in found.series)
    if found.phases:
        return f"{count_word(len(found.series))} phases in one series ({sizes} slices); choose one with --series"
    patients = len({each.patient for each in found.series})
    whose = f" of {count_word(patients)} patients" if patients > 1 else ""
    return f"mixed series: {len(found.series)} CT series{whose} ({sizes} slices); choose one with --series"


def select_series(path: Path, name: str | None = None, rules: Sequence[Callable[[Series], bool]] = ()) -> Path:
    """Return the path of the series that a name or rules choose. Only an export with several series needs a choice.

    Parameters
    ----------
    name
        Number or key of a series, as the user gave it.
    rules
        Conditions, applied in order as long as several series are left. The first must leave one; a later one that none
        of them fits is ignored.

    Raises
    ------
    SeveralSeriesError
        More than one series is left, or none.
    InputError
        The export has no CT series, or a file cannot be read.
    """
    base, key = split_path(path)
    if key is not None or not is_series(path):
        return path
    found = find_series(base)
    if name is not None:
        chosen = [each for each in found.series if name in (each.number, each.key, f"series-{each.key}")]
        if len(chosen) != 1:
            count = "no CT series has" if not chosen else f"{len(chosen)} CT series have"
            raise SeveralSeriesError(base, f"{count} the number given with --series", found.series)
        return series_path(base, chosen[0]) if len(found.series) > 1 else path
    left = list(found.series)
    if len(left) < 2 or (base.is_file() and not is_zip(base)):
        return path
    for index, rule in enumerate(rules):
        fitting = [each for each in left if rule(each)] if len(left) > 1 else left
        if not fitting and index == 0:
            raise SeveralSeriesError(base, f"none of {len(left)} CT series fits the setting `series`", found.series)
        left = fitting or left
    if len(left) > 1:
        raise SeveralSeriesError(base, _several(replace(found, series=tuple(left))), found.series)
    return series_path(base, left[0])


def patient_id(path: Path) -> str | None:
    """Return the PatientID of a series. It may be a name: the caller must hash it at once and never show or store it.

    None: the tag is missing or empty, contains a value that anonymisers write for all patients, or the file cannot be
    read. Reading the scan then reports the error. Only one file is read, because a series belongs to one patient.
    """
    try:
        header = first_header(path, (PATIENT,))
    except (InputError, OSError):
        return None
    found = "" if header is None else header.text(PATIENT)
    return None if re.sub(r"[\W_]", "", found.casefold()) in _ANONYMOUS_IDS else found


def first_header(path: Path, tags: Sequence[int] | None = None) -> Header | None:
    """Return the header of the first DICOM file of an export, with these tags or all. None: it has none.

    Raises InputError.
    """
    base, key = split_path(path)
    if key is not None:
        return read_header(choose_series(path)[0].files[0], tags)
    files = (DicomFile(base),) if base.is_file() and not is_zip(base) else list_export(base).files
    return next((header for file in files if (header := read_header(file, tags)) is not None), None)
