"""List the images of the public sets in `zsad.config.layouts`, with labels from file names, lists or masks."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from medad.base.errors import InputError
from medad.base.storage import reading
from zsad.config.layouts import NEXT_TO_IMAGE, LabelList, Layout
from zsad.data.images import IMAGE_SUFFIXES, JPEG_SUFFIXES, MASK_SUFFIXES
from zsad.data.listing import FoundImage, files_in, folders_in, is_visible
from zsad.data.masks import load_mask

PUBLIC_MASK_SUFFIXES = (*JPEG_SUFFIXES, *(suffix for suffix in MASK_SUFFIXES if suffix not in JPEG_SUFFIXES))
"""Suffixes of masks; some publishers ship JPEG. If a mask exists twice, the later suffix is used."""


@dataclass(frozen=True)
class FoundSet:
    """Location of a public set."""

    folders: dict[str, Path]
    """Folders of the categories by name, in natural order."""
    single: bool
    """Whether the folder is a single category. The user may give it another name."""


def find_set(layout: Layout, root: Path) -> FoundSet | None:
    """Find the categories of a set in a folder. Returns None if the folder does not have this layout."""
    for base in (root / below for below in layout.base_folders):
        if layout.categories and base.is_dir():
            folders = {
                folder.name: folder
                for folder in folders_in(base)
                if fnmatch.fnmatchcase(folder.name, layout.categories) and _has_images(layout, folder)
            }
            if folders:
                return FoundSet(folders, single=False)
        if _has_images(layout, base):
            return FoundSet({layout.category or base.resolve().name: base}, single=True)
    return None


def public_set_images(layout: Layout, folder: Path) -> Iterator[FoundImage]:
    """List the images of a category's test or train folder.

    In a set with masks each anomalous image needs one. If labels come from masks or a list, each image needs an entry
    there. An image without it is listed with the rule that it breaks.

    Raises
    ------
    InputError
        A folder or the list of labels cannot be read.
    """
    if layout.labels_from == "mask" and layout.mixed and layout.masks and not (folder / layout.masks).is_dir():
        yield FoundImage("", folder, "", None, rule=f"no folder {layout.masks}/, which defines the labels")
        return
    masks = _MaskFinder(layout, folder)
    seen: set[Path] = set()
    for patterns, anomalous in ((layout.normal, False), (layout.anomalous, True)):
        for path in _matching_images(layout, folder, patterns):
            if path not in seen:
                seen.add(path)
                yield _labelled(layout, folder, path, masks.find(path), anomalous=anomalous)
    listed = _read_list(folder / layout.labels.file, layout.labels) if layout.labels else {}
    for path in _matching_images(layout, folder, layout.mixed):
        flag = listed.pop(_number(path.stem), None)
        yield _from_mixed_folder(layout, folder, path, masks.find(path), None if flag is None else flag[1])
    for name, _ in listed.values():
        assert layout.labels is not None, "the entries come from the list"
        rule = f"listed in {Path(layout.labels.file).name}, but the file is missing"
        yield FoundImage(name, folder / name, layout.defect, None, rule=rule)


def _from_mixed_folder(layout: Layout, folder: Path, path: Path, mask: Path | None, listed: bool | None) -> FoundImage:
    """Return an image from a folder that contains both normal and anomalous images."""
    if layout.labels_from == "mask":
        return _labelled(layout, folder, path, mask, anomalous=mask is not None or bool(listed))
    rule: str | None = None
    anomalous = bool(listed)
    if layout.labels_from == "list":
        if listed is None:
            assert layout.labels is not None, "the labels come from a list"
            rule = f"without a label: {layout.labels.file} does not name it"
    elif mask is None:
        rule = f"without a label: no {path.stem}{layout.mask_suffix}.* next to it"
    else:
        try:
            anomalous = bool(load_mask(mask).any())
        except InputError as error:
            rule = f"without a label: {mask.name} {error.rule}"
    labelled = _labelled(layout, folder, path, mask, anomalous=anomalous)
    return labelled if rule is None else replace(labelled, rule=rule, mask=None)


def _labelled(layout: Layout, folder: Path, path: Path, mask: Path | None, *, anomalous: bool) -> FoundImage:
    key = path.relative_to(folder).as_posix()
    if not anomalous:
        return FoundImage(key, path, "good", anomalous=False)
    image = FoundImage(key, path, layout.defect, anomalous=True, mask=mask)
    if layout.masks is None or mask is not None:
        return image
    where = "next to it" if layout.masks == NEXT_TO_IMAGE else f"in {layout.masks}/"
    return replace(image, rule=f"anomalous, but without a mask: no {path.stem}{layout.mask_suffix}.* {where}")


class _MaskFinder:
    """Finder of masks by stem. It lists each folder once."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self._layout, self._folder = layout, folder
        self._listings: dict[Path, dict[str, Path]] = {}

    def find(self, image: Path) -> Path | None:
        if self._layout.masks is None:
            return None
        folder = image.parent if self._layout.masks == NEXT_TO_IMAGE else self._folder / self._layout.masks
        if folder not in self._listings:
            files = files_in(folder, PUBLIC_MASK_SUFFIXES) if folder.is_dir() else []
            files.sort(key=lambda file: PUBLIC_MASK_SUFFIXES.index(file.suffix.lower()))
            self._listings[folder] = {file.stem: file for file in files}
        return self._listings[folder].get(image.stem + self._layout.mask_suffix)


def _has_images(layout: Layout, folder: Path) -> bool:
    test = folder / layout.test
    if layout.labels_from == "list" and layout.labels is not None and not (test / layout.labels.file).is_file():
        return False
    return any(True for _ in _matching_images(layout, test, layout.patterns))


def _matching_images(layout: Layout, folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """List the images that match the patterns, each once, in the order of patterns, then of names. Masks are left
    out."""
    found = dict.fromkeys(path for pattern in patterns for path in sorted(folder.glob(pattern)))
    for path in found:
        is_mask = layout.masks == NEXT_TO_IMAGE and path.stem.endswith(layout.mask_suffix)
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_visible(path.name, IMAGE_SUFFIXES) and path.is_file() and not is_mask and not hidden:
            yield path


def _read_list(path: Path, columns: LabelList) -> dict[str, tuple[str, bool]]:
    """Return the name and label of each image in a list, by its number. Empty if the list does not exist."""
    if not path.is_file():
        return {}
    with reading(path):
        data = path.read_bytes()
    listed: dict[str, tuple[str, bool]] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        row = re.split(r"[,\s]+", line.strip())
        if len(row) > max(columns.image_column, columns.anomalous_column) and row[columns.anomalous_column] in {
            "0",
            "1",
        }:
            name = row[columns.image_column]
            listed[_number(Path(name).stem)] = (name, row[columns.anomalous_column] == "1")
    if not listed:
        raise InputError(path, "has no row with an image and the label 0 or 1")
    return listed


def _number(stem: str) -> str:
    """Return a number without leading zeros, because lists have 0 for 000.png."""
    return stem.lstrip("0") or "0"
