"""Layouts of image sets on disk -> categories of test images, and normal training images where a set has some.

Only names are read; no image is opened, but for the masks of sets whose labels they are (KolektorSDD).
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from medad.base.errors import CaseFailure, ConfigError, InputError
from medad.base.settings import data_root
from medad.base.storage import reading
from medad.base.text import natural_order
from zsad.config.layouts import LAYOUTS, DeclaredName, Layout, expected
from zsad.config.run import ImagesSettings
from zsad.data.declared import declared_images, place
from zsad.data.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from zsad.data.listing import Found, files_in, folders_in, images_below

SAMPLES_PREFIX = "samples:"
NORMAL_FOLDERS = frozenset({"good", "normal", "ok"})
"""Folders, in any case of letters, whose images show no anomaly. Every other label is one."""
_MASK_FOLDERS = ("ground_truth", "masks")
_VISA_SPLITS = "split_csv"
_VISA_DEFAULT_SPLIT = ImagesSettings.model_fields["visa_split"].default
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_DIGEST_CHARACTERS = 12
_Reader = Literal["mvtec", "visa", "folder"] | Layout
_Named = Literal["mvtec", "visa", "folder", DeclaredName]
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
class _Opened:
    """A root whose layout is known."""

    root: Path
    layout: _Named
    """As the settings say, or as was found out."""
    reader: _Reader
    folders: dict[str, Path]
    """The categories' folders by name."""


def find_categories(data: ImagesSettings, samples_dir: Path | None = None) -> tuple[list[Category], list[CaseFailure]]:
    """List a set's test images, category by category.

    Training images are never listed. VisA's split file is used where there is one (its rows with split `test`);
    without it all images count as test images. Its rows go by the category's folder, or, where it knows one object
    alone, to the only folder that could be meant. An anomalous image needs a mask, unless the category has no folder of
    masks at all: then there are labels for images alone. Sets of `zsad.config.layouts` have masks or not as
    declared there.
    Hidden files are skipped.

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
    opened = _open(data, samples_dir)
    missing = [name for name in data.categories or () if name not in opened.folders]
    if missing:
        raise _unknown(missing[0], opened)
    categories: list[Category] = []
    problems: list[CaseFailure] = []
    for name, folder in opened.folders.items():
        if data.categories is None or name in data.categories:
            found = list(_search(folder, opened.reader, data))
            whole = [CaseFailure(name, "find", one.rule, str(one.path)) for one in found if not one.key and one.rule]
            items, rejected = _with_ids(name, [one for one in found if one.key], opaque=data.opaque_ids)
            problems += whole + rejected
            if items:
                categories.append(Category(name, tuple(items)))
            elif not whole and not rejected:
                problems.append(CaseFailure(name, "find", "no test image in this category", str(folder)))
    if not categories:
        why = f"; the first of {len(problems)} problems: {problems[0].rule}" if problems else ""
        raise _unusable(opened.root, opened.layout, why)
    return categories, problems


def normal_training_images(data: ImagesSettings, category: str, samples_dir: Path | None = None) -> tuple[Path, ...]:
    """A category's normal training images, as references for few-shot systems.

    MVTec AD and the like: `train/good` (in any of `NORMAL_FOLDERS`' names); VisA: rows `train`, `normal` of its
    split file; sets of `zsad.config.layouts`: normal images of the part that is declared as `train`. No test image is
    among them.

    Parameters
    ----------
    data
        As for `find_categories`; `data.categories` plays no part.
    category
        A name that `find_categories` gives.

    Returns
    -------
    Paths in natural order of their names below the category's folder; one at least.

    Raises
    ------
    InputError
        No such category; the set has no training images, or this category no normal ones.
    ConfigError
        As `find_categories`.
    """
    opened = _open(data, samples_dir)
    if category not in opened.folders:
        raise _unknown(category, opened)
    folder = opened.folders[category]
    if isinstance(opened.reader, Layout):
        train = None if opened.reader.train is None else folder / opened.reader.train
        found = declared_images(opened.reader, train) if train is not None and train.is_dir() else ()
        images = [one.path for one in found if one.anomalous is False and one.rule is None]
    elif opened.reader == "mvtec":
        train = folder / "train"
        labels = [label for label in (folders_in(train) if train.is_dir() else ()) if _is_normal(label)]
        images = [label / below for label in labels for below in images_below(label)]
    elif opened.reader == "visa" and (split := _split_file(folder, data)) is not None:
        rows = _visa_split(split, folder, part="train")
        images = [one.path for one in rows if one.anomalous is False and one.rule is None]
    else:
        images = []
    if not images:
        raise InputError(folder, f"no normal training images (layout {opened.layout}), which few-shot references are")
    return tuple(sorted(images, key=lambda path: natural_order(path.relative_to(folder).as_posix())))


def _open(data: ImagesSettings, samples_dir: Path | None) -> _Opened:
    """Find a set's categories. Raises what `find_categories` says of roots, layouts and settings that do not fit."""
    root = data_root(data.root, samples_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder of images")
    layout = _detect(root) if data.layout == "auto" else data.layout
    if data.masks is not None and layout != "folder":
        raise ConfigError(f"data.masks: only layout folder takes it, this is {layout}")
    if data.visa_split != _VISA_DEFAULT_SPLIT and layout != "visa":
        raise ConfigError(f"data.visa_split: only layout visa takes it, this is {layout}")
    reader, folders, single = _resolve(root, layout)
    if data.category is not None and not single:
        raise ConfigError(f"data.category: {root} holds several categories; data.categories chooses among them")
    if data.category is not None:
        [only] = folders.values()
        folders = {data.category: only}
    return _Opened(root, layout, reader, folders)


def _resolve(root: Path, layout: _Named) -> tuple[_Reader, dict[str, Path], bool]:
    """How a root is read, its categories' folders, and whether it is one category; of several layouts the first."""
    own = {root.resolve().name: root}
    match layout:
        case "folder":
            return layout, own, True
        case "mvtec" | "visa":
            single = _is_category(root, layout)
            return layout, own if single else _category_folders(root, layout), single
        case _:
            declared_layouts = LAYOUTS[layout]
    for declared in declared_layouts:
        if not isinstance(declared, Layout):
            reader, folders, single = _resolve(root, declared)
            if folders:
                return reader, folders, single
        elif (placed := place(declared, root)) is not None:
            return declared, placed.folders, placed.single
    raise _unusable(root, layout)


def _unknown(category: str, opened: _Opened) -> InputError:
    names = ", ".join(opened.folders) or "none"
    return InputError(opened.root, f"no category {category}; there are {names} (layout {opened.layout})")


def _unusable(root: Path, layout: _Named, why: str = "") -> InputError:
    shape = _EXPECTED if layout in {"mvtec", "visa", "folder"} else expected(cast(DeclaredName, layout))
    return InputError(root, f"no usable image of layout {layout}{why}; expected {shape}")


def images_of(paths: Sequence[Path]) -> Category:
    """Images without labels, from files and folders (searched to the bottom), each file once.

    A file that is named is taken whatever its ending; in folders, files with `IMAGE_SUFFIXES`. The category is named
    after the first folder. Ids are paths relative to the folder given, and unique.

    Raises
    ------
    InputError
        A path is missing, or a folder holds no image.
    """
    found: dict[Path, Found] = {}
    for path in paths:
        if path.is_dir():
            files = [(relative, path / relative) for relative in images_below(path)]
            if not files:
                raise InputError(path, f"no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
        elif path.exists():
            files = [(Path(path.name), path)]
        else:
            raise InputError(path, "no such file or folder")
        for relative, file in files:
            found.setdefault(file.resolve(), Found(relative.as_posix(), file, "", None))
    if not found:
        raise InputError("images", "none given")
    first = paths[0].resolve()
    name = first.name if first.is_dir() else first.parent.name
    items, _ = _with_ids(name, list(found.values()), opaque=False)
    return Category(name or "images", tuple(items))


def _detect(root: Path) -> Literal["mvtec", "visa", "folder"]:
    kinds: tuple[Literal["visa", "mvtec"], ...] = ("visa", "mvtec")
    for layout in kinds:
        if _is_category(root, layout) or _category_folders(root, layout):
            return layout
    return "folder"


def _is_category(folder: Path, layout: str) -> bool:
    return (folder / {"mvtec": "test", "visa": "Data/Images"}[layout]).is_dir()


def _category_folders(root: Path, layout: str) -> dict[str, Path]:
    return {folder.name: folder for folder in folders_in(root) if _is_category(folder, layout)}


def _search(folder: Path, reader: _Reader, data: ImagesSettings) -> Iterator[Found]:
    """What one category's folder holds."""
    if isinstance(reader, Layout):
        yield from declared_images(reader, folder / reader.test)
    elif reader == "mvtec":
        truth = folder / "ground_truth"
        yield from _labelled(folder / "test", truth if truth.is_dir() else None)
    elif reader == "visa":
        split = _split_file(folder, data)
        yield from _visa(folder) if split is None else _visa_split(split, folder, part="test")
    else:
        yield from _plain(folder, data.masks)


def _split_file(folder: Path, data: ImagesSettings) -> Path | None:
    """VisA's split file for a category's folder. None: there is none. Raises InputError for one asked for in vain."""
    name = Path(_VISA_SPLITS) / f"{data.visa_split}.csv"
    split = next((top / name for top in (folder.parent, folder) if (top / name).is_file()), None)
    if split is None and data.visa_split != _VISA_DEFAULT_SPLIT:
        raise InputError(folder.parent / name, "no such split file")
    return split


def _is_normal(label: Path) -> bool:
    return label.name.lower() in NORMAL_FOLDERS


def _labelled(test: Path, masks: Path | None) -> Iterator[Found]:
    """Images in folders named by label, masks in folders of the same names (or all in one)."""
    labels = [folder for folder in folders_in(test) if folder != masks and folder.name not in _MASK_FOLDERS]
    for file in files_in(test, IMAGE_SUFFIXES):
        yield Found(file.name, file, "", None, rule="lies beside the label folders, so it has no label")
    anomalous: list[Found] = []
    for label in labels:
        is_normal = _is_normal(label)
        images = [
            Found(f"{label.name}/{below.as_posix()}", label / below, label.name, anomalous=not is_normal)
            for below in images_below(label)
        ]
        if is_normal or masks is None:
            yield from images
        else:
            anomalous += images
    if masks is not None:
        yield from _with_masks(anomalous, test, masks)


def _with_masks(images: list[Found], test: Path, masks: Path) -> Iterator[Found]:
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


def _visa(folder: Path) -> Iterator[Found]:
    """VisA's own folders without a split file: every image is a test image."""
    images, masks = folder / "Data" / "Images", folder / "Data" / "Masks"
    yield from _labelled(images, masks if masks.is_dir() else None)


def _visa_split(split: Path, folder: Path, *, part: Literal["train", "test"]) -> Iterator[Found]:
    """The rows of VisA's split file for one part of one category; their paths start where split_csv lies."""
    rows = _split_rows(split)
    top, named = split.parent.parent, list(dict.fromkeys(row["object"] for row in rows))
    category = folder.resolve().name
    if category not in named:
        renamed = len(named) == 1 and not (top / named[0]).is_dir()
        if not renamed or len(_category_folders(top, "visa")) > 1:
            rule = f"{_VISA_SPLITS}/{split.name} knows no {category}, only {', '.join(named)}"
            yield Found("", folder, "", None, rule=rule)
            return
        category = named[0]
    for number, row in enumerate(rows, start=2):
        if row["object"] != category or row["split"] != part:
            continue
        if row["label"] not in {"normal", "anomaly"} or not row["image"]:
            raise InputError(split, f"line {number}: expected label normal or anomaly, and an image")
        path, anomalous = _listed(row["image"], category, top, folder), row["label"] == "anomaly"
        defect = path.parent.name
        image = Found(f"{defect}/{path.name}", path, defect, anomalous)
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


def _plain(root: Path, masks_name: str | None) -> Iterator[Found]:
    """Label folders, if there is a normal one or, without images beside them, masks; else images without labels."""
    names = _MASK_FOLDERS if masks_name is None else (masks_name,)
    masks = next((root / name for name in names if (root / name).is_dir()), None)
    if masks_name is not None and masks is None:
        raise InputError(root / masks_name, "no such folder of masks")
    reserved = {masks, *(root / name for name in _MASK_FOLDERS)}
    labels = [folder for folder in folders_in(root) if folder not in reserved and images_below(folder)]
    with_masks = bool(labels) and masks is not None and not files_in(root, IMAGE_SUFFIXES)
    if with_masks or any(_is_normal(folder) for folder in labels):
        yield from _labelled(root, masks)
    elif masks_name is not None:
        raise InputError(root, "masks need label folders beside them, such as good/ and broken/")
    else:
        for relative in images_below(root):
            if reserved.isdisjoint((root / relative).parents):
                yield Found(relative.as_posix(), root / relative, "", None)


def _with_ids(category: str, found: list[Found], *, opaque: bool) -> tuple[list[Item], list[CaseFailure]]:
    """Keys lose their ending where they stay unique; where keys are equal (files of several folders) they get -2 ..."""
    stems = Counter(str(Path(key).with_suffix("")) for key in {each.key for each in found})
    taken: set[str] = set()
    items: list[Item] = []
    problems: list[CaseFailure] = []
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
            problems.append(CaseFailure(f"{category}/{name}", "find", rule, str(each.path), category))
    return items, problems
