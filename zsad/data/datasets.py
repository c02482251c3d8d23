"""Layouts of image sets on disk -> categories of test images, and normal training images where a set has some.

Only names are read; no image is opened, but for the masks of sets whose labels they are (KolektorSDD).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from medad.base.errors import CaseFailure, ConfigError, InputError
from medad.base.settings import data_root
from medad.base.text import natural_order
from zsad.config.layouts import LAYOUTS, Layout, PublicSetName, describe_layouts
from zsad.config.run import ImagesSettings
from zsad.data.images import IMAGE_SUFFIXES
from zsad.data.label_folders import (
    VISA_DEFAULT_SPLIT,
    category_folders,
    is_category,
    is_normal,
    labelled_images,
    plain_images,
    split_file,
    visa_images,
    visa_split_images,
)
from zsad.data.listing import FoundImage, folders_in, images_below
from zsad.data.public_sets import find_set, public_set_images

_DIGEST_CHARACTERS = 12
_Reader = Literal["mvtec", "visa", "folder"] | Layout
_LayoutName = Literal["mvtec", "visa", "folder", PublicSetName]
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
class _ImageSet:
    """A root whose layout is known."""

    root: Path
    layout: _LayoutName
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
        In natural order of names, each with one image at least. With `pseudonyms` an id is a digest of the image's
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
    opened = _open_set(data, samples_dir)
    missing = [name for name in data.categories or () if name not in opened.folders]
    if missing:
        raise _unknown_category(missing[0], opened)
    categories: list[Category] = []
    problems: list[CaseFailure] = []
    for name, folder in opened.folders.items():
        if data.categories is None or name in data.categories:
            found = list(_list_images(folder, opened.reader, data))
            of_category = [
                CaseFailure(name, "find", one.rule, str(one.path)) for one in found if not one.key and one.rule
            ]
            items, rejected = _assign_ids(name, [one for one in found if one.key], pseudonymous=data.pseudonyms)
            problems += of_category + rejected
            if items:
                categories.append(Category(name, tuple(items)))
            elif not of_category and not rejected:
                problems.append(CaseFailure(name, "find", "no test image in this category", str(folder)))
    if not categories:
        why = f"; the first of {len(problems)} problems: {problems[0].rule}" if problems else ""
        raise _no_usable_image(opened.root, opened.layout, why)
    return categories, problems


def normal_training_images(data: ImagesSettings, category: str, samples_dir: Path | None = None) -> tuple[Path, ...]:
    """A category's normal training images, as references for few-shot systems.

    MVTec AD and the like: `train/good`, or another name of `label_folders.NORMAL_FOLDERS`. VisA: rows `train`,
    `normal` of its split file. Sets of `zsad.config.layouts`: normal images of the part declared as `train`. No test
    image is among them.

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
    opened = _open_set(data, samples_dir)
    if category not in opened.folders:
        raise _unknown_category(category, opened)
    folder = opened.folders[category]
    if isinstance(opened.reader, Layout):
        train = None if opened.reader.train is None else folder / opened.reader.train
        found = public_set_images(opened.reader, train) if train is not None and train.is_dir() else ()
        images = [one.path for one in found if one.anomalous is False and one.rule is None]
    elif opened.reader == "mvtec":
        train = folder / "train"
        labels = [label for label in (folders_in(train) if train.is_dir() else ()) if is_normal(label)]
        images = [label / below for label in labels for below in images_below(label)]
    elif opened.reader == "visa" and (split := split_file(folder, data)) is not None:
        rows = visa_split_images(split, folder, part="train")
        images = [one.path for one in rows if one.anomalous is False and one.rule is None]
    else:
        images = []
    if not images:
        raise InputError(folder, f"no normal training images (layout {opened.layout}), which few-shot references are")
    return tuple(sorted(images, key=lambda path: natural_order(path.relative_to(folder).as_posix())))


def _open_set(data: ImagesSettings, samples_dir: Path | None) -> _ImageSet:
    """Find a set's categories. Raises what `find_categories` says of roots, layouts and settings that do not fit."""
    root = data_root(data.root, samples_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder of images")
    layout = _detect_layout(root) if data.layout == "auto" else data.layout
    if data.masks is not None and layout != "folder":
        raise ConfigError(f"data.masks: only layout folder takes it, this is {layout}")
    if data.visa_split != VISA_DEFAULT_SPLIT and layout != "visa":
        raise ConfigError(f"data.visa_split: only layout visa takes it, this is {layout}")
    reader, folders, single = _resolve_layout(root, layout)
    if data.category is not None and not single:
        raise ConfigError(f"data.category: {root} holds several categories; data.categories chooses among them")
    if data.category is not None:
        [only] = folders.values()
        folders = {data.category: only}
    return _ImageSet(root, layout, reader, folders)


def _resolve_layout(root: Path, layout: _LayoutName) -> tuple[_Reader, dict[str, Path], bool]:
    """How a root is read, its categories' folders, and whether it is one category; of several layouts the first."""
    own = {root.resolve().name: root}
    match layout:
        case "folder":
            return layout, own, True
        case "mvtec" | "visa":
            single = is_category(root, layout)
            return layout, own if single else category_folders(root, layout), single
        case _:
            declared_layouts = LAYOUTS[layout]
    for declared in declared_layouts:
        if not isinstance(declared, Layout):
            reader, folders, single = _resolve_layout(root, declared)
            if folders:
                return reader, folders, single
        elif (found := find_set(declared, root)) is not None:
            return declared, found.folders, found.single
    raise _no_usable_image(root, layout)


def _unknown_category(category: str, opened: _ImageSet) -> InputError:
    names = ", ".join(opened.folders) or "none"
    return InputError(opened.root, f"no category {category}; there are {names} (layout {opened.layout})")


def _no_usable_image(root: Path, layout: _LayoutName, why: str = "") -> InputError:
    shape = _EXPECTED if layout in {"mvtec", "visa", "folder"} else describe_layouts(cast(PublicSetName, layout))
    return InputError(root, f"no usable image of layout {layout}{why}; expected {shape}")


def unlabelled_images(paths: Sequence[Path]) -> Category:
    """Images without labels, from files and folders (searched to the bottom), each file once.

    A file that is named is taken whatever its ending; in folders, files with `IMAGE_SUFFIXES`. The category is named
    after the first folder. Ids are paths relative to the folder given, and unique.

    Raises
    ------
    InputError
        A path is missing, or a folder holds no image.
    """
    found: dict[Path, FoundImage] = {}
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
            found.setdefault(file.resolve(), FoundImage(relative.as_posix(), file, "", None))
    if not found:
        raise InputError("images", "none given")
    first = paths[0].resolve()
    name = first.name if first.is_dir() else first.parent.name
    items, _ = _assign_ids(name, list(found.values()), pseudonymous=False)
    return Category(name or "images", tuple(items))


def _detect_layout(root: Path) -> Literal["mvtec", "visa", "folder"]:
    kinds: tuple[Literal["visa", "mvtec"], ...] = ("visa", "mvtec")
    for layout in kinds:
        if is_category(root, layout) or category_folders(root, layout):
            return layout
    return "folder"


def _list_images(folder: Path, reader: _Reader, data: ImagesSettings) -> Iterator[FoundImage]:
    """What one category's folder holds."""
    if isinstance(reader, Layout):
        yield from public_set_images(reader, folder / reader.test)
    elif reader == "mvtec":
        truth = folder / "ground_truth"
        yield from labelled_images(folder / "test", truth if truth.is_dir() else None)
    elif reader == "visa":
        split = split_file(folder, data)
        yield from visa_images(folder) if split is None else visa_split_images(split, folder, part="test")
    else:
        yield from plain_images(folder, data.masks)


def _assign_ids(category: str, found: list[FoundImage], *, pseudonymous: bool) -> tuple[list[Item], list[CaseFailure]]:
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
        if pseudonymous:
            digest = hashlib.sha256(f"{category}/{name}".encode()).hexdigest()
            name, defect = f"image-{digest[:_DIGEST_CHARACTERS]}", "anomalous" if each.anomalous else "good"
        if each.rule is None:
            items.append(Item(name, each.path, each.anomalous, defect if each.anomalous is not None else "", each.mask))
        else:
            # what follows the mark may hold file names, which pseudonyms are there to hide
            rule = each.rule.split(":")[0] if pseudonymous else each.rule
            problems.append(CaseFailure(f"{category}/{name}", "find", rule, str(each.path), category))
    return items, problems
