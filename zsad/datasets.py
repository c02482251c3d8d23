"""Layouts of industrial image sets on disk -> categories of test images. Only names are read; no image is opened."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medad.errors import ConfigError, InputError
from medad.settings import data_root
from medad.storage import reading
from medad.words import natural_order
from zsad.config import ImagesSettings
from zsad.images import IMAGE_SUFFIXES, MASK_SUFFIXES

SAMPLES_PREFIX = "samples:"
NORMAL_FOLDERS = frozenset({"good", "normal", "ok"})
"""Folders, in any case of letters, whose images show no anomaly. Every other label is one."""
_MASK_FOLDERS = ("ground_truth", "masks")
_VISA_SPLITS = "split_csv"
_VISA_DEFAULT_SPLIT = ImagesSettings.model_fields["visa_split"].default
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_DIGEST_CHARACTERS = 12
_EXPECTED = (
    "CATEGORY/test/good and others (mvtec), CATEGORY/Data/Images/Normal and Anomaly (visa), "
    "label folders with good among them, or images (folder)"
)


@dataclass(frozen=True)
class Item:
    """One test image."""

    id: str
    """Unique in its category, a relative path without ending: `scratch/003`."""
    path: Path
    anomalous: bool | None
    """None: nobody says."""
    defect: str
    """The label's folder; empty where there is no label."""
    mask: Path | None
    """None: normal, without label, or of a set that has no masks."""


@dataclass(frozen=True)
class Category:
    """The test images of one kind of product, in natural order of their ids (2 before 10)."""

    name: str
    items: tuple[Item, ...]

    @property
    def labelled(self) -> bool:
        """Whether every image is known to be normal or anomalous."""
        return all(item.anomalous is not None for item in self.items)


@dataclass(frozen=True)
class ImageProblem:
    """An image that is left out, and why. `id` is empty where the problem is the whole category's."""

    category: str
    id: str
    path: Path
    rule: str


@dataclass(frozen=True)
class _Found:
    key: str  # relative path with its ending; empty where the rule is about the whole category
    path: Path
    defect: str
    anomalous: bool | None
    mask: Path | None = None
    rule: str | None = None


def find_categories(data: ImagesSettings, samples_dir: Path | None = None) -> tuple[list[Category], list[ImageProblem]]:
    """List a set's test images, category by category.

    Training images are never listed. VisA's split file is used where there is one (its rows with split `test`);
    without it all images count as test images. Its rows go by the category's folder, or, where it knows one object
    alone, to the only folder that could be meant. An anomalous image needs a mask, unless the category has no folder of
    masks at all: then there are labels for images alone. Hidden files are skipped.

    Parameters
    ----------
    data
        Root, layout, and which categories to take.
    samples_dir
        Where `samples:NAME` roots lie.

    Returns
    -------
    categories
        In natural order of names, each with one image at least. With `opaque_ids` an id is a digest of the image's
        name and `defect` is just `good` or `anomalous`.
    problems
        Images without their mask or label, listed but missing; categories that hold nothing usable.

    Raises
    ------
    InputError
        The root is missing, holds no image of the layout, or not a category asked for; a broken split file.
    ConfigError
        A category's name, a folder of masks or a split is given where the layout has its own, or none.
    """
    root = data_root(data.root, samples_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder of images")
    layout = _detect(root) if data.layout == "auto" else data.layout
    if data.masks is not None and layout != "folder":
        raise ConfigError(f"data.masks: only layout folder takes it, this is {layout}")
    if data.visa_split != _VISA_DEFAULT_SPLIT and layout != "visa":
        raise ConfigError(f"data.visa_split: only layout visa takes it, this is {layout}")
    single = layout == "folder" or _is_category(root, layout)
    if data.category is not None and not single:
        raise ConfigError(f"data.category: {root} holds several categories; data.categories chooses among them")
    folders = {data.category or root.resolve().name: root} if single else _category_folders(root, layout)
    missing = [name for name in data.categories or () if name not in folders]
    if missing:
        raise InputError(root, f"no category {missing[0]}; there are {', '.join(folders) or 'none'} (layout {layout})")
    categories: list[Category] = []
    problems: list[ImageProblem] = []
    for name, folder in folders.items():
        if data.categories is None or name in data.categories:
            found = list(_search(folder, layout, data))
            whole = [ImageProblem(name, "", one.path, one.rule) for one in found if not one.key and one.rule]
            items, rejected = _with_ids(name, [one for one in found if one.key], opaque=data.opaque_ids)
            problems += whole + rejected
            if items:
                categories.append(Category(name, tuple(items)))
            elif not whole and not rejected:
                problems.append(ImageProblem(name, "", folder, "no test image in this category"))
    if not categories:
        why = f"; the first of {len(problems)} problems: {problems[0].rule}" if problems else ""
        raise InputError(root, f"no usable image of layout {layout}{why}; expected {_EXPECTED}")
    return categories, problems


def images_of(paths: Sequence[Path]) -> Category:
    """Images without labels, from files and folders (searched to the bottom), each file once.

    A file that is named is taken whatever its ending; in folders, files with `IMAGE_SUFFIXES`. The category is named
    after the first folder. Ids are paths relative to the folder given, and unique.

    Raises
    ------
    InputError
        A path is missing, or a folder holds no image.
    """
    found: dict[Path, _Found] = {}
    for path in paths:
        if path.is_dir():
            files = [(relative, path / relative) for relative in _images_below(path)]
            if not files:
                raise InputError(path, f"no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
        elif path.exists():
            files = [(Path(path.name), path)]
        else:
            raise InputError(path, "no such file or folder")
        for relative, file in files:
            found.setdefault(file.resolve(), _Found(relative.as_posix(), file, "", None))
    if not found:
        raise InputError("images", "none given")
    first = paths[0].resolve()
    name = first.name if first.is_dir() else first.parent.name
    items, _ = _with_ids(name, list(found.values()), opaque=False)
    return Category(name or "images", tuple(items))


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Relative paths, sorted, of all visible files with these endings at any depth.

    Links to folders are not followed, as they may form loops. Raises InputError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(error.filename or folder, f"cannot be read ({error.strerror})") from error

    found: list[Path] = []
    for here, below, files in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [(Path(here) / name).relative_to(folder) for name in files if _is_visible(name, suffixes)]
    return sorted(found)


def _detect(root: Path) -> str:
    for layout in ("visa", "mvtec"):
        if _is_category(root, layout) or _category_folders(root, layout):
            return layout
    return "folder"


def _is_category(folder: Path, layout: str) -> bool:
    return (folder / {"mvtec": "test", "visa": "Data/Images"}[layout]).is_dir()


def _category_folders(root: Path, layout: str) -> dict[str, Path]:
    return {folder.name: folder for folder in _folders(root) if _is_category(folder, layout)}


def _search(folder: Path, layout: str, data: ImagesSettings) -> Iterator[_Found]:
    """What one category's folder holds."""
    if layout == "mvtec":
        truth = folder / "ground_truth"
        yield from _labelled(folder / "test", truth if truth.is_dir() else None)
    elif layout == "visa":
        name = Path(_VISA_SPLITS) / f"{data.visa_split}.csv"
        split = next((top / name for top in (folder.parent, folder) if (top / name).is_file()), None)
        if split is None and data.visa_split != _VISA_DEFAULT_SPLIT:
            raise InputError(folder.parent / name, "no such split file")
        yield from _visa(folder) if split is None else _visa_split(split, folder)
    else:
        yield from _plain(folder, data.masks)


def _labelled(test: Path, masks: Path | None) -> Iterator[_Found]:
    """Images in folders named by label, masks in folders of the same names (or all in one)."""
    labels = [folder for folder in _folders(test) if folder != masks and folder.name not in _MASK_FOLDERS]
    for file in _files(test, IMAGE_SUFFIXES):
        yield _Found(file.name, file, "", None, rule="lies beside the label folders, so it has no label")
    anomalous: list[_Found] = []
    for label in labels:
        is_normal = label.name.lower() in NORMAL_FOLDERS
        images = [
            _Found(f"{label.name}/{below.as_posix()}", label / below, label.name, anomalous=not is_normal)
            for below in _images_below(label)
        ]
        if is_normal or masks is None:
            yield from images
        else:
            anomalous += images
    if masks is not None:
        yield from _with_masks(anomalous, test, masks)


def _with_masks(images: list[_Found], test: Path, masks: Path) -> Iterator[_Found]:
    """Find STEM_mask.* or STEM.* for each image, in the folder of its label or, where there is none, beside all."""
    listings: dict[Path, dict[str, Path]] = {}
    stems = Counter(image.path.stem for image in images)
    for image in images:
        stem, shared = image.path.stem, not (masks / image.defect).is_dir()
        folder = masks if shared else (masks / image.path.relative_to(test)).parent
        if folder not in listings:
            files = _files(folder, MASK_SUFFIXES) if folder.is_dir() else []
            listings[folder] = {file.stem: file for file in files}
        mask = listings[folder].get(f"{stem}_mask", listings[folder].get(stem))
        if mask is None:
            yield replace(image, rule=f"anomalous, but without a mask: no {stem}[_mask].png in {folder.name}/")
        elif shared and stems[stem] > 1:
            yield replace(image, rule=f"ambiguous mask: {mask.name} could be another image's of the same name")
        else:
            yield replace(image, mask=mask)


def _visa(folder: Path) -> Iterator[_Found]:
    """VisA's own folders without a split file: every image is a test image."""
    images, masks = folder / "Data" / "Images", folder / "Data" / "Masks"
    yield from _labelled(images, masks if masks.is_dir() else None)


def _visa_split(split: Path, folder: Path) -> Iterator[_Found]:
    """The rows of VisA's split file for one category with split `test`; their paths start where split_csv lies."""
    rows = _split_rows(split)
    top, named = split.parent.parent, list(dict.fromkeys(row["object"] for row in rows))
    category = folder.resolve().name
    if category not in named:
        renamed = len(named) == 1 and not (top / named[0]).is_dir()
        if not renamed or len(_category_folders(top, "visa")) > 1:
            rule = f"{_VISA_SPLITS}/{split.name} knows no {category}, only {', '.join(named)}"
            yield _Found("", folder, "", None, rule=rule)
            return
        category = named[0]
    for number, row in enumerate(rows, start=2):
        if row["object"] != category or row["split"] != "test":
            continue
        if row["label"] not in {"normal", "anomaly"} or not row["image"]:
            raise InputError(split, f"line {number}: expected label normal or anomaly, and an image")
        path, anomalous = _listed(row["image"], category, top, folder), row["label"] == "anomaly"
        defect = path.parent.name
        image = _Found(f"{defect}/{path.name}", path, defect, anomalous)
        mask = _listed(row["mask"], category, top, folder) if anomalous and row["mask"] else None
        if not path.is_file():
            yield replace(image, rule=f"listed in {split.name}, but not there")
        elif anomalous and (mask is None or not mask.is_file()):
            yield replace(image, rule=f"anomalous, but without a mask: {split.name} names none that is there")
        else:
            yield replace(image, mask=mask)


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


def _listed(name: str, category: str, top: Path, folder: Path) -> Path:
    """A file of a split file's row, which calls the category's folder by the category's name."""
    first, _, rest = name.partition("/")
    return folder / rest if first == category else top / name


def _plain(root: Path, masks_name: str | None) -> Iterator[_Found]:
    """Label folders, if there is a normal one or, without images beside them, masks; else images without labels."""
    names = _MASK_FOLDERS if masks_name is None else (masks_name,)
    masks = next((root / name for name in names if (root / name).is_dir()), None)
    if masks_name is not None and masks is None:
        raise InputError(root / masks_name, "no such folder of masks")
    reserved = {masks, *(root / name for name in _MASK_FOLDERS)}
    labels = [folder for folder in _folders(root) if folder not in reserved and _images_below(folder)]
    with_masks = bool(labels) and masks is not None and not _files(root, IMAGE_SUFFIXES)
    if with_masks or any(folder.name.lower() in NORMAL_FOLDERS for folder in labels):
        yield from _labelled(root, masks)
    elif masks_name is not None:
        raise InputError(root, "masks need label folders beside them, such as good/ and broken/")
    else:
        for relative in _images_below(root):
            if reserved.isdisjoint((root / relative).parents):
                yield _Found(relative.as_posix(), root / relative, "", None)


def _with_ids(category: str, found: list[_Found], *, opaque: bool) -> tuple[list[Item], list[ImageProblem]]:
    """Keys lose their ending where they stay unique; where keys are equal (files of several folders) they get -2 ..."""
    stems = Counter(str(Path(key).with_suffix("")) for key in {each.key for each in found})
    taken: set[str] = set()
    items: list[Item] = []
    problems: list[ImageProblem] = []
    for each in sorted(found, key=lambda f: (natural_order(f.key), f.path)):
        stem = str(Path(each.key).with_suffix(""))
        wanted = stem if stems[stem] == 1 else each.key
        name = wanted
        number = 2
        while name in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name)
        defect = each.defect
        if opaque:
            digest = hashlib.sha256(f"{category}/{name}".encode()).hexdigest()
            name, defect = f"image-{digest[:_DIGEST_CHARACTERS]}", "anomalous" if each.anomalous else "good"
        if each.rule is None:
            items.append(Item(name, each.path, each.anomalous, defect if each.anomalous is not None else "", each.mask))
        else:
            # what follows the mark may hold file names, which opaque ids are there to hide
            rule = each.rule.split(":")[0] if opaque else each.rule
            problems.append(ImageProblem(category, name, each.path, rule))
    return items, problems


def _folders(folder: Path) -> list[Path]:
    with reading(folder):
        found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: natural_order(path.name))


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    with reading(folder):
        return sorted(path for path in folder.iterdir() if _is_visible(path.name, suffixes) and path.is_file())


def _is_visible(name: str, suffixes: tuple[str, ...]) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes


def _images_below(folder: Path) -> list[Path]:
    return files_below(folder, IMAGE_SUFFIXES)
