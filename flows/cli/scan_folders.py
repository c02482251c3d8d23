"""A folder of scans, and a folder of their liver masks, as arguments of a command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medad.base.errors import ConfigError
from medad.base.text import natural_order

ENDINGS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr")
_CHANNEL = re.compile(r"_0000$")
"""Ending of the names of scans in nnU-Net's data sets."""
_OF_MASKS = re.compile(r"([_-]?(liver|leber|label|labels|mask|seg|segmentation))+$", re.IGNORECASE)


def expand_folders(scans: Sequence[Path], masks: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the scans and masks in folders of files. A folder of DICOM is a scan and stays.

    A mask in a folder belongs to the scan of the same name, apart from endings such as `_liver` and `_0000`.

    Raises
    ------
    ConfigError
        A scan of a folder has no mask, or several.
    """
    if len(scans) != 1 or not (files := volumes_in(scans[0])) or (masks and not masks[0].is_dir()):
        return list(scans), list(masks)
    if not masks:
        return files, []
    found: dict[str, list[Path]] = {}
    for mask in volumes_in(masks[0]):
        found.setdefault(_case_name(mask), []).append(mask)
    chosen = []
    for scan in files:
        fitting = found.get(_case_name(scan), [])
        if len(fitting) != 1:
            what = "no mask" if not fitting else f"{len(fitting)} masks"
            raise ConfigError(f"{scan}: {what} of this name in {masks[0]}")
        chosen += fitting
    return files, chosen


def volumes_in(folder: Path) -> list[Path]:
    """Return the volumes directly in a folder, in natural order. They are empty for a file or a folder of DICOM."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    volumes = [path for path in files if path.name.lower().endswith(ENDINGS)]
    if any(not path.suffix or path.suffix.lower() in (".dcm", ".ima") for path in files):
        return []  # slices with a volume beside them
    return sorted(volumes, key=lambda path: natural_order(path.name))


def _case_name(path: Path) -> str:
    name = path.name
    ending = next(ending for ending in ENDINGS if name.lower().endswith(ending))
    stem = _CHANNEL.sub("", name[: -len(ending)].removesuffix(".seg"))
    return _OF_MASKS.sub("", stem) or stem
