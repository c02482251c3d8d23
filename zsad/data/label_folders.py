"""Readers of sets whose labels are names of folders or rows of a list: MVTec AD, VisA and plain folders."""

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
"""Folders, in any case of letters, whose images show no anomaly. Every other label is one."""
_MASK_FOLDERS = ("ground_truth", "masks")
_VISA_SPLITS = "split_csv"
VISA_DEFAULT_SPLIT = ImagesSettings.model_fields["visa_split"].default
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")


def is_category(folder: Path, layout: str) -> bool:
    """Tell whether a folder is laid out as one category of `mvtec` or `visa`."""
    return (folder / {"mvtec": "test", "visa": "Data/Images"}[layout]).is_dir()


def category_folders(root: Path, layout: str) -> dict[str, Path]:
    """Map names of categories to their folders within a root."""
    return {folder.name: folder for folder in folders_in(root) if is_category(folder, layout)}


def is_normal(label: Path) -> bool:
    """Tell whether a label's folder holds normal images."""
    return label.name.lower() in NORMAL_FOLDERS


def labelled_images(test: Path, masks: Path | None) -> Iterator[FoundImage]:
    """List images in folders named by label, with masks from folders of the same names, or from one folder."""
    labels = [folder for folder in folders_in(test) if folder != masks and folder.name not in _MASK_FOLDERS]
    for file in files_in(test, IMAGE_SUFFIXES):
        yield FoundImage(file.name, file, "", None, rule="lies beside the label folders, so it has no label")
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
    """List label folders if one is normal or, without images beside them, masks exist; else images without labels."""
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
        raise InputError(root, "masks need label folders beside them, such as good/ and broken/")
    else:
        for relative in images_below(root):
            if reserved.isdisjoint((root / relative).parents):
                yield FoundImage(relative.as_posix(), root / relative, "", None)


def visa_images(folder: Path) -> Iterator[FoundImage]:
    """List VisA's own folders without a split file: every image is a test image."""
    images, masks = folder / "Data" / "Images", folder / "Data" / "Masks"
    yield from labelled_images(images, masks if masks.is_dir() else None)


def visa_split_images(split: Path, folder: Path, *, part: Literal["train", "test"]) -> Iterator[FoundImage]:
    """List one part of one category by VisA's split file, whose paths start where split_csv lies."""
    rows = _split_rows(split)
    top, named = split.parent.parent, list(dict.fromkeys(row["object"] for row in rows))
    category = folder.resolve().name
    if category not in named:
        renamed = len(named) == 1 and not (top / named[0]).is_dir()
        if not renamed or len(category_folders(top, "visa")) > 1:
            rule = f"{_VISA_SPLITS}/{split.name} knows no {category}, only {', '.join(named)}"
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
            yield replace(image, rule=f"listed in {split.name}, but not there")
        elif anomalous and (mask is None or not mask.is_file()):
            yield replace(image, rule=f"anomalous, but without a mask: {split.name} names none that is there")
        else:
            yield replace(image, mask=mask)


def split_file(folder: Path, data: ImagesSettings) -> Path | None:
    """Find VisA's split file for a category's folder, or None. Raises InputError if the one asked for is missing."""
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
    """A file of a split file's row, which calls the category's folder by the category's name."""
    first, _, rest = name.partition("/")
    return folder / rest if first == category else top / name


def _find_masks(images: list[FoundImage], test: Path, masks: Path) -> Iterator[FoundImage]:
    """Find STEM_mask.* or STEM.* for each image, in the folder of its label or, where there is none, beside all."""
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
