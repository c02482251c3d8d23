"""List folders and image files by name, for the readers of layouts. Opens no file and skips hidden files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from medad.base.errors import InputError
from medad.base.storage import reading
from medad.base.text import natural_order
from zsad.data.images import IMAGE_SUFFIXES


@dataclass(frozen=True)
class FoundImage:
    """Image that has no id yet. With a `rule` that it breaks, it is reported as a problem."""

    key: str
    """Relative path with its suffix. Empty if the rule concerns the whole category."""
    path: Path
    defect: str
    """Kind of defect, `good` or a similar name for a normal image, or empty without a label."""
    anomalous: bool | None
    """Label. None: unknown."""
    mask: Path | None = None
    rule: str | None = None
    """Rule that the image breaks. None: the image is usable."""


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the sorted relative paths of all visible files with these suffixes at any depth.

    Links to folders are not followed, because they may form loops. Raises InputError if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(error.filename or folder, f"cannot be read ({error.strerror})") from error

    found: list[Path] = []
    for here, below, files in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [(Path(here) / name).relative_to(folder) for name in files if is_visible(name, suffixes)]
    return sorted(found)


def images_below(folder: Path) -> list[Path]:
    """Return the sorted relative paths of all images at any depth. Raises InputError if a folder cannot be read."""
    return files_below(folder, IMAGE_SUFFIXES)


def folders_in(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, in natural order. Raises InputError if it cannot be read."""
    with reading(folder):
        found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: natural_order(path.name))


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the visible files with these suffixes in a folder, sorted. Raises InputError if it cannot be read."""
    with reading(folder):
        return sorted(path for path in folder.iterdir() if is_visible(path.name, suffixes) and path.is_file())


def is_visible(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file name is not hidden and has one of these suffixes, in upper or lower case."""
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes
