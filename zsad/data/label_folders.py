"""List images of MVTec AD, of VisA and of plain folders, with labels from folder names or from VisA's split file."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from medad.base.errors import InputError
from medad.base.storage import reading
from medad.base.text import list_names
from zsad.config.run import ImagesSettings
from zsad.data.images import IMAGE_SUFFIXES
from zsad.data.listing import UNLABELLED, FoundImage, LeftOut, files_in, folders_in, images_below
from zsad.data.mask_finder import find_masks
from zsad.data.masks import MASK_FOLDERS
from zsad.data.photographs import NORMAL_FOLDERS, label_images, only_jpeg, photographs

UNKNOWN_FOLDERS = frozenset({"unknown", "unlabelled", "unlabeled", "unsorted"})
"""Names of folders whose images have no label, in lower case."""
_PROBABLY_NORMAL = re.compile(
    r"pass(ed)?|accept(ed)?|i\.?o\.?|fine|clean|healthy|intact|perfect|undamaged|negative"
    r"|(no|non|not|without)[_ -]?(defect|defects|defective|anomaly|anomalies|anomalous|fault)|defect[_ -]?free",
    re.IGNORECASE,
)
_PROBABLY_ANOMALOUS = re.compile(
    r"fail(ed)?|reject(ed)?|n\.?i\.?o\.?|ng|n?ok|ko|not[_ -]?(ok|good)|bad|defect(s|ive)?|damaged|broken|faulty|scrap"
    r"|anomaly|anomalies|anomalous|abnormal|positive",
    re.IGNORECASE,
)
_VISA_SPLITS = "split_csv"
VISA_DEFAULT_SPLIT = ImagesSettings.model_fields["visa_split"].default
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_TESTS = ("test", "test_public")


@dataclass(frozen=True)
class Labelling:
    """How folders are read: which names mean normal, and where skipped files are recorded."""

    normal: frozenset[str] = NORMAL_FOLDERS
    """Names of folders with normal images, in lower case."""
    left_out: LeftOut = field(default_factory=LeftOut)
    category: str = ""
    """Name of the category, for the record."""

    @classmethod
    def of(cls, data: ImagesSettings, left_out: LeftOut) -> Labelling:
        """Return the labelling of the settings."""
        return cls(NORMAL_FOLDERS | {name.lower() for name in data.normal}, left_out)

    def is_normal(self, label: Path) -> bool:
        """Return whether a label's folder contains normal images."""
        return label.name.lower() in self.normal


def is_category(folder: Path, layout: str) -> bool:
    """Return whether a folder has the layout of one category of `mvtec` or `visa`."""
    return tests_of(folder) is not None if layout == "mvtec" else (folder / "Data/Images").is_dir()


def tests_of(folder: Path) -> Path | None:
    """Return the folder of a category's test images: `test`, or `test_public` of MVTec AD 2. None: neither exists."""
    return next((folder / name for name in _TESTS if (folder / name).is_dir()), None)


def category_folders(root: Path, layout: str) -> dict[str, Path]:
    """Return the folders of a root's categories by name."""
    return {folder.name: folder for folder in folders_in(root) if is_category(folder, layout)}


def labelled_categories(root: Path, labelling: Labelling) -> dict[str, Path]:
    """Return the categories of a root in which each folder with images has its own label folders (Real-IAD).

    Empty if the root itself has label folders, or a folder with images has none.
    """
    found: dict[str, Path] = {}
    for folder in folders_in(root):
        if labelling.is_normal(folder) or folder.name.lower() in MASK_FOLDERS:
            return {}
        if any(labelling.is_normal(below) and images_below(below) for below in folders_in(folder)):
            found[folder.name] = folder
        elif images_below(folder):
            return {}
    return {} if files_in(root, IMAGE_SUFFIXES) else found


def look_like_labels(names: Iterable[str]) -> bool:
    """Return whether one of several folder names looks like a label, such as PASS or FAIL."""
    return any(_PROBABLY_NORMAL.fullmatch(name) or _PROBABLY_ANOMALOUS.fullmatch(name) for name in names)


def listing_notes(left_out: LeftOut) -> tuple[str, ...]:
    """Return a record as notes for the report: what was left out, and which labels are not understood."""
    notes = [left_out.sentence] * bool(left_out.sentence)
    for found, effect in (
        (left_out.labels, "so all labelled images count as anomalous"),
        (left_out.guessed, "so these images have no labels"),
    ):
        by_names: dict[tuple[str, ...], list[str]] = {}
        for category, names in found.items():
            by_names.setdefault(names, []).append(category)
        for names, categories in by_names.items():
            shown = f" ({list_names(names, 6)})" if names else ""
            notes.append(
                f"{list_names(categories)}: no folder is called good, normal or ok{shown}, {effect}. If one holds"
                f" normal images, name it: data.normal=[{_probably_normal(names)}]"
            )
    return tuple(notes)


def _probably_normal(names: Sequence[str]) -> str:
    """Return the name that most probably means normal, or a placeholder."""
    likely = [name for name in names if _PROBABLY_NORMAL.fullmatch(name)]
    others = [name for name in names if not _PROBABLY_ANOMALOUS.fullmatch(name)]
    return likely[0] if likely else others[0] if len(others) == 1 < len(names) else "NAME"


def mvtec_images(folder: Path, labelling: Labelling) -> Iterator[FoundImage]:
    """List the test images of a category of MVTec AD, AD 2, LOCO or 3D. Further test folders are recorded."""
    test = tests_of(folder)
    assert test is not None, "the folder is a category"
    for other in folders_in(folder):
        if other != test and other.name.lower().startswith("test"):
            labelling.left_out.add_folder(other, len(images_below(other)))
    masks = [each for top in (folder, test) for each in folders_in(top) if each.name.lower() in MASK_FOLDERS]
    yield from labelled_images(test, next(iter(masks), None), labelling)


def labelled_images(test: Path, masks: Path | None, labelling: Labelling) -> Iterator[FoundImage]:
    """List images in folders named by label. Their masks are in folders of the same names or all in one folder.

    Images without any label folder have no label. Labels without a normal one are recorded.
    """
    left_out = labelling.left_out
    folders = folders_in(test, left_out)
    labels = [folder for folder in folders if folder != masks and folder.name.lower() not in MASK_FOLDERS]
    normal = [path for label in labels if labelling.is_normal(label) for path in images_below(label)]
    pairs = only_jpeg(normal)
    found = {label: label_images(label, left_out, beside=masks is None, pairs=pairs) for label in labels}
    strays = files_in(test, IMAGE_SUFFIXES, left_out)
    if not any(found.values()):
        yield from (FoundImage(file.name, file, "", None) for file in strays)
        return
    for file in strays:
        yield FoundImage(file.name, file, "", None, rule="is outside the label folders, so it has no label")
    anomalous: list[FoundImage] = []
    for label, images in found.items():
        if label.name.lower() in UNKNOWN_FOLDERS:
            for image in images:
                left_out.add(UNLABELLED, label.name, image.path)
                yield replace(image, mask=None)
        elif labelling.is_normal(label):
            yield from (replace(image, anomalous=False, mask=None) for image in images)
        else:
            anomalous += (replace(image, anomalous=True) for image in images)
    if anomalous and not any(labelling.is_normal(label) and images for label, images in found.items()):
        left_out.labels[labelling.category] = tuple(label.name for label, images in found.items() if images)
    yield from find_masks(anomalous, test, masks)


def plain_images(root: Path, masks_name: str | None, labelling: Labelling) -> Iterator[FoundImage]:
    """List the images of a plain folder, with labels if its sub-folders are labels.

    Sub-folders are labels if one of them has a normal name. They also are if masks exist and no image is outside the
    sub-folders. Raises InputError if the named folder of masks is missing or cannot be used.
    """
    folders = folders_in(root, labelling.left_out)
    masks = next((folder for folder in folders if folder.name.lower() in MASK_FOLDERS), None)
    if masks_name is not None:
        masks = root / masks_name
        if not masks.is_dir():
            raise InputError(masks, "no such folder of masks")
    labels = [
        folder
        for folder in folders
        if folder != masks and folder.name.lower() not in MASK_FOLDERS and images_below(folder)
    ]
    with_masks = bool(labels) and masks is not None and not files_in(root, IMAGE_SUFFIXES)
    if with_masks or any(labelling.is_normal(folder) for folder in labels):
        yield from labelled_images(root, masks, labelling)
    elif masks_name is not None:
        raise InputError(root, "masks can only be used with label folders, such as good/ and broken/")
    else:
        names = tuple(folder.name for folder in labels)
        if len(names) > 1 and look_like_labels(names):
            labelling.left_out.guessed[labelling.category] = names
        yield from photographs(root, labelling.left_out)


def visa_images(folder: Path, labelling: Labelling) -> Iterator[FoundImage]:
    """List all images of a VisA category without a split file, as test images."""
    images, masks = folder / "Data" / "Images", folder / "Data" / "Masks"
    yield from labelled_images(images, masks if masks.is_dir() else None, labelling)


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
