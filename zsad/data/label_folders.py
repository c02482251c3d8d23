"""List images of MVTec AD, of VisA and of plain folders, with labels from folder names or from VisA's split file."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from medad.base.errors import InputError
from medad.base.storage import reading
from zsad.config.run import ImagesSettings
from zsad.data.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from zsad.data.listing import FoundImage, files_in, folders_in, images_below

NORMAL_FOLDERS = frozenset({"good", "normal", "ok"})
"""Names of folders with normal images, in upper or lower case. Any other label means anomalous."""
_MASK_FOLDERS = ("ground_truth", "masks")
_VISA_SPLITS = "split_csv"
VISA_DEFAULT_SPLIT = ImagesSettings.model_fields["visa_split"].default
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")


def is_category(folder: Path, layout: str) -> bool:
    """Return whether a folder has the layout of one category of `mvtec` or `visa`."""
    return (folder / {"mvtec": "test", "visa": "Data/Images"}[layout]).is_dir()


def category_folders(root: Path, layout: str) -> dict[str, Path]:
    """Return the folders of a root's categories by name."""
    return {folder.name: folder for folder in folders_in(root) if is_category(folder, layout)}


def is_normal(label: Path) -> bool:
    """Return whether a label's folder contains normal images."""
    return label.name.lower() in NORMAL_FOLDERS


def labelled_images(test: Path, masks: Path | None) -> Iterator[FoundImage]:
    """List images in folders named by label. Their masks are in folders of the same names or all in one folder."""
    labels = [folder for folder in folders_in(test) if folder != masks and folder.name not in _MASK_FOLDERS]
    for file in files_in(test, IMAGE_SUFFIXES):
        yield FoundImage(file.name, file, "", None, rule="is outside the label folders, so it has no label")
    anomalous: list[FoundImage] = []
    for label in labels:
        normal = is_normal(label)
        images = [
            FoundImage(f"{label.name}/{below.as_posix()}", label / below, label.name, anomalous=not normal)
            for below in images_below(label)
        ]
        if normal or masks is None:
            yield from images
        else:
            anomalous += images
    if masks is not None:
        yield from _find_masks(anomalous, test, masks)


def plain_images(root: Path, masks_name: str | None) -> Iterator[FoundImage]:
    """List the images of a plain folder, with labels if its sub-folders are labels.

    Sub-folders are labels if one of them has a normal name. They also are if masks exist and no image is outside the
    sub-folders. Raises InputError if the named folder of masks is missing or cannot be used.
    """
    names = _MASK_FOLDERS if masks_name is None else (masks_name,)
    masks = next((root / name for name in names if (root / name).is_dir()), None)
    if masks_name is not None and masks is None:
        raise InputError(root / masks_name, "no such folder of masks")
    reserved = {masks, *(root / name for name in _MASK_FOLDERS)}
    labels = [folder for folder in folders_in(root) if folder not in reserved and images_below(folder)]
    with_masks = bool(labels) and masks is not None and not files_in(root, IMAGE_SUFFIXES)
    if with_masks or any(is_normal(folder) for folder in labels):
        yield from labelled_images(root, masks)
    elif masks_name is not None:
        raise InputError(root, "masks can only be used with label folders, such as good/ and broken/")
    else:
        for relative in images_below(root):
            if reserved.isdisjoint((root / relative).parents):
                yield FoundImage(relative.as_posix(), root / relative, "", None)


def visa_images(folder: Path) -> Iterator[FoundImage]:
    """List all images of a VisA category without a split file, as test images."""
    images, masks = folder / "Data" / "Images", folder / "Data" / "Masks"
    yield from labelled_images(images, masks if masks.is_dir() else None)


def visa_split_images(split: Path, folder: Path, *, part: Literal["train", "test"]) -> Iterator[FoundImage]:
    """List the train or test part of a category by VisA's split file. Its paths start at the folder of split_csv."""
    rows = _split_rows(split)
    top, named = split.parent.parent, list(dict.fromkeys(row["object"] for row in rows))
    category = folder.resolve().name
    if category not in named:
        renamed = len(named) == 1 and not (top / named[0]).is_dir()
        if not renamed or len(category_folders(top, "visa")) > 1:
            rule = f"{_VISA_SPLITS}/{split.name} has no rows for {category}, only for {', '.join(named)}"
            yield FoundImage("", folder, "", None, rule=rule)
            return
        category = named[0]
    for number, row in enumerate(rows, start=2):
        if row["object"] != category or row["split"] != part:
            continue
        if row["label"] not in {"normal", "anomaly"} or not row["image"]:
            raise InputError(split, f"line {number}: expected label normal or anomaly, and an image")
        path, anomalous = _listed_path(row["image"], category, top, folder), row["label"] == "anomaly"
        defect = path.parent.name
        image = FoundImage(f"{defect}/{path.name}", path, defect, anomalous)
        mask = _listed_path(row["mask"], category, top, folder) if anomalous and row["mask"] else None
        if not path.is_file():
            yield replace(image, rule=f"listed in {split.name}, but the file is missing")
        elif anomalous and (mask is None or not mask.is_file()):
            yield replace(image, rule=f"anomalous, but without a mask: {split.name} names no existing one")
        else:
            yield replace(image, mask=mask)


def split_file(folder: Path, data: ImagesSettings) -> Path | None:
    """Return VisA's split file for a category's folder, or None. Raises InputError if the requested one is missing."""
    name = Path(_VISA_SPLITS) / f"{data.visa_split}.csv"
    split = next((top / name for top in (folder.parent, folder) if (top / name).is_file()), None)
    if split is None and data.visa_split != VISA_DEFAULT_SPLIT:
        raise InputError(folder.parent / name, "no such split file")
    return split


def _split_rows(split: Path) -> list[dict[str, str]]:
    with reading(split):
        data = split.read_bytes()
    try:
        rows = list(csv.DictReader(data.decode("utf-8-sig").splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(split, f"not a split file of VisA: {error}") from error
    if not rows or not set(_VISA_COLUMNS) <= set(rows[0]):
        raise InputError(split, f"not a split file of VisA: expected the columns {', '.join(_VISA_COLUMNS)}")
    return rows


def _listed_path(name: str, category: str, top: Path, folder: Path) -> Path:
    """Return the path of a file that a split file lists. The category's folder may have been renamed."""
    first, _, rest = name.partition("/")
    return folder / rest if first == category else top / name


def _find_masks(images: list[FoundImage], test: Path, masks: Path) -> Iterator[FoundImage]:
    """Find the mask STEM_mask.* or STEM.* of each image.

    It is in the folder of masks with the label's name or, without such a folder, directly in the folder of masks.
    """
    listings: dict[Path, dict[str, Path]] = {}
    stems = Counter(image.path.stem for image in images)
    for image in images:
        stem, shared = image.path.stem, not (masks / image.defect).is_dir()
        folder = masks if shared else (masks / image.path.relative_to(test)).parent
        if folder not in listings:
            files = files_in(folder, MASK_SUFFIXES) if folder.is_dir() else []
            listings[folder] = {file.stem: file for file in files}
        mask = listings[folder].get(f"{stem}_mask", listings[folder].get(stem))
        if mask is None:
            yield replace(image, rule=f"anomalous, but without a mask: no {stem}[_mask].png in {folder.name}/")
        elif shared and stems[stem] > 1:
            yield replace(image, rule=f"ambiguous mask: {mask.name} could be another image's of the same name")
        else:
            yield replace(image, mask=mask)
