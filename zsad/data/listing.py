"""Folders and names of image files, what readers of layouts are made of. Opens nothing, skips hidden files."""

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
    """An image, before it has an id; with a `rule` that it breaks it becomes a problem."""

    key: str
    """Relative path with its ending; empty where the rule is about the whole category."""
    path: Path
    defect: str
    anomalous: bool | None
    mask: Path | None = None
    rule: str | None = None


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Relative paths, sorted, of all visible files with these endings at any depth.

    Links to folders are not followed, as they may form loops. Raises InputError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(error.filename or folder, f"cannot be read ({error.strerror})") from error

    found: list[Path] = []
    for here, below, files in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [(Path(here) / name).relative_to(folder) for name in files if is_visible(name, suffixes)]
    return sorted(found)


def images_below(folder: Path) -> list[Path]:
    """`files_below` with an image's ending."""
    return files_below(folder, IMAGE_SUFFIXES)


def folders_in(folder: Path) -> list[Path]:
    """Visible folders in natural order. Raises InputError for a folder that cannot be read."""
    with reading(folder):
        found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: natural_order(path.name))


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Visible files with these endings, sorted. Raises InputError for a folder that cannot be read."""
    with reading(folder):
        return sorted(path for path in folder.iterdir() if is_visible(path.name, suffixes) and path.is_file())


def is_visible(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name is not hidden and has one of these endings, in any case of letters."""
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes
