"""Tell photographs from the masks, depth images and training images that lie in the same folders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medad.base.errors import InputError
from zsad.data.images import JPEG_SUFFIXES, decode
from zsad.data.listing import BESIDE, FoundImage, LeftOut, folders_in, images_below
from zsad.data.masks import MASK_FOLDERS, bare_stem, is_marked_mask

NORMAL_FOLDERS = frozenset({"good", "normal", "ok"})
"""Names of folders with normal images, in lower case. `data.normal` adds names. Other labels mean anomalous."""
_LOSSLESS = frozenset({".png", ".bmp"})
_DEPTH_FOLDERS = frozenset({"xyz", "depth", "pcd", "pointcloud", "normals"})
_TRAINING_FOLDERS = frozenset({"train", "training", "validation", "val", "valid"})


def photographs(root: Path, left_out: LeftOut) -> Iterator[FoundImage]:
    """List the images without labels below a folder that are photographs to score.

    Not listed are folders of masks, point clouds beside `rgb`, `labels` beside `images`, and training folders beside a
    folder `test`. Nor are masks beside their images. All of these are recorded. If nothing else is there, the folder
    holds only such images, and they are listed.
    """
    skipped: dict[Path, list[Path]] = defaultdict(list)
    kept: list[Path] = []
    reserved = _Reserved(root)
    for relative in images_below(root, left_out):
        folder = reserved.folder_of(relative)
        (kept if folder is None else skipped[folder]).append(relative)
    if not kept:
        kept = sorted(path for paths in skipped.values() for path in paths)
        skipped.clear()
    for folder, paths in skipped.items():
        left_out.add_folder(root / folder, len(paths))
    normal = [path for path in kept if not NORMAL_FOLDERS.isdisjoint(name.lower() for name in path.parts[:-1])]
    masks = masks_beside(kept, None if only_jpeg(normal) else root)
    for mask in masks.values():
        left_out.add(BESIDE, "mask", root / mask)
    own = set(masks.values())
    yield from (FoundImage(path.as_posix(), root / path, "", None) for path in kept if path not in own)


def label_images(label: Path, left_out: LeftOut, *, beside: bool, pairs: bool) -> list[FoundImage]:
    """List the images of one label's folder, with masks that lie in it, beside the images or in a folder of masks.

    In a folder with `rgb` beside `gt` and `xyz` (MVTec 3D), the images are those in `rgb`. The labels are not set.

    Parameters
    ----------
    beside
        Whether masks may lie beside their images. False: the set has a folder of masks, so all files are images.
    pairs
        Whether any PNG beside a JPEG of the same stem is its mask (Real-IAD). False: only one with two values is.
    """
    images = images_below(label, left_out)
    names = {folder.name.lower(): folder.name for folder in folders_in(label)}
    inner = next((name for lower, name in names.items() if lower in MASK_FOLDERS), None)
    depth = {name for lower, name in names.items() if lower in _DEPTH_FOLDERS}
    rgb = names.get("rgb") if inner or depth else None
    if rgb is not None:
        photos = [path for path in images if path.parts[0] == rgb]
        depth |= {path.parts[0] for path in images} - {rgb, inner}
    else:
        photos = [path for path in images if path.parts[0] not in {inner, *depth}]
    for name in depth:
        left_out.add_folder(label / name, sum(path.parts[0] == name for path in images))
    masks = masks_beside(photos, None if pairs else label) if beside else {}
    own = set(masks.values())
    found = []
    for path in photos:
        if path in own:
            continue
        below = Path(*path.parts[1:]) if rgb is not None else path
        mask = masks.get(path)
        if mask is None and inner is not None:
            mask = _same_stem(images, Path(inner) / below)
        key = f"{label.name}/{below.as_posix()}"
        found.append(FoundImage(key, label / path, label.name, None, mask=None if mask is None else label / mask))
    return found


def only_jpeg(images: Sequence[Path]) -> bool:
    """Return whether there are images, and all of them are JPEG files."""
    return bool(images) and all(path.suffix.lower() in JPEG_SUFFIXES for path in images)


def masks_beside(images: Sequence[Path], root: Path | None = None) -> dict[Path, Path]:
    """Return the masks among images by image: `x_mask.png` beside `x.jpg`, or `x.png` beside `x.jpg` (Real-IAD).

    Parameters
    ----------
    images
        Relative paths.
    root
        Folder of the paths. If given, a file of the second kind must have at most two values, so its pixels are read.
        A photograph may lie beside a copy in another format.
    """
    found: dict[Path, Path] = {}
    folders = defaultdict[Path, list[Path]](list)
    for path in images:
        folders[path.parent].append(path)
    for files in folders.values():
        stems = {path.stem.lower(): path for path in files}
        found |= {
            stems[bare_stem(path.stem)]: path for path in files if is_marked_mask(path.stem, stems.keys())
        }  # fmt: skip
        photos = {path.stem: path for path in files if path.suffix.lower() in JPEG_SUFFIXES}
        for path in files:
            if (
                path.suffix.lower() in _LOSSLESS
                and path.stem in photos
                and (root is None or _has_two_values(root / path))
            ):
                found[photos[path.stem]] = path
    return found


def _has_two_values(path: Path) -> bool:
    try:
        return decode(path, lambda image, _: np.unique(np.asarray(image.convert("L"))).size <= 2)
    except InputError:
        return False


def _same_stem(images: Sequence[Path], wanted: Path) -> Path | None:
    """Return the image in the folder of `wanted` whose stem names it, such as `x_mask`. None: there is none."""
    return next(
        (
            path
            for path in images
            if path.parent == wanted.parent and wanted.stem.lower() in {path.stem.lower(), bare_stem(path.stem)}
        ),
        None,
    )


class _Reserved:
    """Folders below a root whose images are not photographs to score. Each folder is listed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._below: dict[Path, frozenset[str]] = {}

    def folder_of(self, image: Path) -> Path | None:
        """Return the outermost reserved folder that holds an image, both relative to the root. None: a photograph."""
        for depth in range(len(image.parts) - 1):
            parent, name = Path(*image.parts[:depth]), image.parts[depth]
            if self._is_reserved(parent, name.lower()):
                return parent / name
        return None

    def _is_reserved(self, parent: Path, name: str) -> bool:
        if name in MASK_FOLDERS:
            return True
        if parent not in self._below:
            self._below[parent] = frozenset(folder.name.lower() for folder in folders_in(self._root / parent))
        beside = self._below[parent]
        return (
            (name in _DEPTH_FOLDERS and "rgb" in beside)
            or (name == "labels" and "images" in beside)
            or (name in _TRAINING_FOLDERS and any(each.startswith("test") for each in beside))
        )
