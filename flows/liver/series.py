"""The choice of a CT series, remembered so that an unchanged export is looked through once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flows.store.digests import digest_memory
from flows.store.references import canonical_json
from medad.base.errors import InputError
from medad.config.series import SeriesSettings


@dataclass(frozen=True)
class SeriesChooser:
    """A function from a scan and its mask to the scan's series. A path without a choice to make is returned as it is.

    Raises SeveralSeriesError and InputError, unless it is `lenient`. Then the reading of the scan reports the error.
    """

    rule: SeriesSettings | None = None
    name: str | None = None
    """Number or key of a series, as the user gave it."""
    lenient: bool = False

    def __call__(self, scan: Path, mask: Path | None) -> Path:
        from medad.ct.dicom_choice import export_files, is_series

        try:
            if not scan.exists() or not is_series(scan):
                return scan
            compute = _Choose(self.rule, self.name, mask)
            files = [*export_files(scan), *([mask] if mask is not None and mask.is_file() else [])]
            key = digest_memory().get(scan, compute, files)
        except InputError:
            if self.lenient:
                return scan
            raise
        except OSError as error:
            raise InputError(scan, f"cannot be read ({error.strerror})") from error
        return scan / key if key else scan


class _Choose:
    """The computation of a choice. Its name says what the choice depends on besides the files."""

    __module__ = __name__

    def __init__(self, rule: SeriesSettings | None, name: str | None, mask: Path | None) -> None:
        self.rule, self.name, self.mask = rule, name, mask
        values = {"rule": None if rule is None else rule.model_dump(mode="json"), "name": name}
        self.__qualname__ = f"choice-{hashlib.sha256(canonical_json(values).encode()).hexdigest()}"

    def __call__(self, scan: Path) -> str:
        """Return the last component of the path of the chosen series, or an empty text."""
        from medad.ct.dicom_choice import select_series

        rules: list[Callable[..., bool]] = []
        if self.rule is not None:
            rule = self.rule
            rules.append(lambda s: rule.fits(s.description, s.kernel, s.thickness_mm, s.number))
        if self.mask is not None:
            mask = self.mask
            rules += [lambda series: lies_on(mask, series, scan), lambda series: has_size_of(mask, series, scan)]
        chosen = select_series(scan, self.name, rules if self.rule is not None else [lambda _: True, *rules])
        return "" if chosen == scan else chosen.name


def lies_on(mask: Path, series: object, scan: Path) -> bool:
    """Return whether a mask lies on the grid of a series."""
    from medad.ct.dicom import series_geometry
    from medad.ct.io import read_labels_on

    try:
        read_labels_on(series_geometry(series, scan), mask)  # type: ignore[arg-type]
    except InputError:
        return False
    return True


def has_size_of(mask: Path, series: object, scan: Path) -> bool:
    """Return whether a mask has as many voxels as a series. A cropped mask lies on several series."""
    from medad.ct.dicom import series_geometry
    from medad.ct.io import read_labels

    try:
        return read_labels(mask).geometry.canonical_shape == series_geometry(series, scan).canonical_shape  # type: ignore[arg-type]
    except InputError:
        return False
