"""Find the test images of a set by category, and its normal training images, if it has any.

Only names are read. The only files opened are the masks of sets in which a black mask means normal (KolektorSDD).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    Labelling,
    category_folders,
    is_category,
    labelled_categories,
    mvtec_images,
    plain_images,
    split_file,
    visa_images,
    visa_split_images,
)
from zsad.data.listing import FoundImage, LeftOut, folders_in, readable_name, require_file
from zsad.data.photographs import label_images, photographs
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
    """Id, unique in its category: a relative path without suffix, such as `scratch/003`."""
    path: Path
    anomalous: bool | None
    """Label. None: unknown."""
    defect: str
    """Kind of defect, which is the name of the label's folder. Empty without a label."""
    mask: Path | None
    """Mask file, or a folder of masks to join. None: the image is normal or unlabelled, or the set has no masks."""


@dataclass(frozen=True)
class Category:
    """Test images of one kind of product, in natural order of their ids (2 before 10)."""

    name: str
    items: tuple[Item, ...]

    @property
    def labelled(self) -> bool:
        """Whether every image is known to be normal or anomalous."""
        return all(item.anomalous is not None for item in self.items)


@dataclass(frozen=True)
class _ImageSet:
    """Image set with a known layout."""

    root: Path
    layout: _LayoutName
    """Name of the layout, from the settings or detected."""
    reader: _Reader
    folders: dict[str, Path]
    """Folders of the categories by name."""


def find_categories(
    data: ImagesSettings, samples_dir: Path | None = None
) -> tuple[list[Category], list[CaseFailure], LeftOut]:
    """List a set's test images by category.

    Training images are never listed, and hidden files are skipped. If VisA's split file exists, its rows with split
    `test` are the test images. Without it, all images are test images. Rows of the split file belong to the folder with
    the name of their object. If the file has a single object and only one folder fits, they belong to that folder.

    An anomalous image needs a mask, unless the category has no folder of masks. Then only image labels are known. For
    sets of `zsad.config.layouts` the layout says whether there are masks.

    Parameters
    ----------
    data
        Root, layout and categories to list.
    samples_dir
        Folder of the sample data, for roots `samples:NAME`.

    Returns
    -------
    categories
        In natural order of names, each with at least one image. With `pseudonyms` an id is a digest of the image's
        name, and `defect` is `good` or `anomalous`.
    problems
        Images that lack a mask or a label, images that are listed but missing, and categories without a usable image.
    left_out
        Record of files and folders that were not looked at, and of labels that are not understood.

    Raises
    ------
    InputError
        The root is missing, has no image in this layout or lacks a requested category, or the split file is broken.
    ConfigError
        A category name, mask folder or split is set, but the layout does not allow it.
    """
    opened = _open_set(data, samples_dir)
    left_out = LeftOut()
    labelling = Labelling.of(data, left_out)
    missing = [name for name in data.categories or () if name not in opened.folders]
    if missing:
        raise _unknown_category(missing[0], opened)
    categories: list[Category] = []
    problems: list[CaseFailure] = []
    for name, folder in opened.folders.items():
        if data.categories is None or name in data.categories:
            found = list(_list_images(folder, opened.reader, data, replace(labelling, category=name)))
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
        raise _no_usable_image(opened.root, opened.layout, _what_lies_there(left_out) + why)
    _check_normal(data, opened, left_out)
    if data.pseudonyms:
        left_out.hide_names()
    return categories, problems, left_out


def _what_lies_there(left_out: LeftOut) -> str:
    return f"; {left_out.sentence[0].lower()}{left_out.sentence[1:].rstrip('.')}" if left_out.sentence else ""


def _check_normal(data: ImagesSettings, opened: _ImageSet, left_out: LeftOut) -> None:
    """Raise InputError if `data.normal` names no folder although categories lack a normal one."""
    if data.normal and left_out.labels:
        names = dict.fromkeys(name for labels in left_out.labels.values() for name in labels)
        if {name.lower() for name in data.normal}.isdisjoint(name.lower() for name in names):
            rule = f"data.normal: no folder is called {' or '.join(data.normal)}; the label folders are"
            raise InputError(opened.root, f"{rule} {', '.join(names)}")


def normal_training_images(data: ImagesSettings, category: str, samples_dir: Path | None = None) -> tuple[Path, ...]:
    """Return a category's normal training images, which few-shot systems use.

    Layout `mvtec`: images in `train/good`, or in `train` under another name of `label_folders.NORMAL_FOLDERS`. VisA:
    rows of the split file with split `train` and label `normal`. Sets of `zsad.config.layouts`: normal images in the
    layout's `train` folder. Test images are never returned.

    Parameters
    ----------
    data
        As for `find_categories`. `data.categories` is ignored.
    category
        Name of a category that `find_categories` returns.

    Returns
    -------
    Paths in natural order of their names below the category's folder; at least one.

    Raises
    ------
    InputError
        The category does not exist, the set has no training images, or the category has no normal training image.
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
        train, labelling = folder / "train", Labelling.of(data, LeftOut())
        labels = [label for label in (folders_in(train) if train.is_dir() else ()) if labelling.is_normal(label)]
        images = [one.path for label in labels for one in label_images(label, LeftOut(), beside=False, pairs=False)]
    elif opened.reader == "visa" and (split := split_file(folder, data)) is not None:
        rows = visa_split_images(split, folder, part="train")
        images = [one.path for one in rows if one.anomalous is False and one.rule is None]
    else:
        images = []
    if not images:
        raise InputError(folder, f"no normal training images (layout {opened.layout}); few-shot systems need them")
    return tuple(sorted(images, key=lambda path: natural_order(path.relative_to(folder).as_posix())))


def _open_set(data: ImagesSettings, samples_dir: Path | None) -> _ImageSet:
    """Find a set's layout and categories. Raises InputError and ConfigError as `find_categories` does."""
    root = data_root(data.root, samples_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder of images")
    layout = detect_layout(root) if data.layout == "auto" else data.layout
    if data.masks is not None and layout != "folder":
        raise ConfigError(f"data.masks: only for layout folder, but the layout is {layout}")
    if data.visa_split != VISA_DEFAULT_SPLIT and layout != "visa":
        raise ConfigError(f"data.visa_split: only for layout visa, but the layout is {layout}")
    reader, folders, single = _resolve_layout(root, layout, Labelling.of(data, LeftOut()))
    if data.category is not None and not single:
        raise ConfigError(f"data.category: {root} contains several categories; select some with data.categories")
    if data.category is not None:
        [only] = folders.values()
        folders = {data.category: only}
    return _ImageSet(root, layout, reader, folders)


def _resolve_layout(root: Path, layout: _LayoutName, labelling: Labelling) -> tuple[_Reader, dict[str, Path], bool]:
    """Return how a root is read, its categories' folders, and whether it is one category. The first layout that fits
    is used."""
    own = {root.resolve().name: root}
    match layout:
        case "folder":
            several = labelled_categories(root, labelling)
            return layout, several or own, not several
        case "mvtec" | "visa":
            single = is_category(root, layout)
            return layout, own if single else category_folders(root, layout), single
        case _:
            declared_layouts = LAYOUTS[layout]
    for declared in declared_layouts:
        if not isinstance(declared, Layout):
            reader, folders, single = _resolve_layout(root, declared, labelling)
            if folders:
                return reader, folders, single
        elif (found := find_set(declared, root)) is not None:
            return declared, found.folders, found.single
    raise _no_usable_image(root, layout)


def _unknown_category(category: str, opened: _ImageSet) -> InputError:
    names = ", ".join(opened.folders) or "none"
    return InputError(opened.root, f"no category {category}; the set has {names} (layout {opened.layout})")


def _no_usable_image(root: Path, layout: _LayoutName, why: str = "") -> InputError:
    shape = _EXPECTED if layout in {"mvtec", "visa", "folder"} else describe_layouts(cast(PublicSetName, layout))
    return InputError(root, f"no usable image of layout {layout}{why}; expected {shape}")


def unlabelled_images(paths: Sequence[Path]) -> tuple[Category, list[CaseFailure], LeftOut]:
    """List images without labels from files and folders, each file once.

    Folders are searched at all depths for files with `IMAGE_SUFFIXES`. A file given by name may have any suffix. Of a
    labelled set, in layout `mvtec`, `visa` or with label folders, only the test images are listed. Masks and training
    images are left out, see `zsad.data.photographs.photographs`.

    Returns
    -------
    category
        Images with ids that are unique paths relative to the given folder. It has the name of the first folder.
    problems
        Paths that do not exist or are not files, and folders without an image.
    left_out
        Record of files and folders that were not looked at.

    Raises
    ------
    InputError
        No image was found. The message names the first problem.
    """
    found: dict[Path, FoundImage] = {}
    problems: list[InputError] = []
    left_out = LeftOut()
    for path in paths:
        try:
            if path.is_dir():
                files = list(_unlabelled_below(path, left_out))
                if not files:
                    rule = f"no image in this folder ({', '.join(IMAGE_SUFFIXES)}){_what_lies_there(left_out)}"
                    raise InputError(path, rule)
            else:
                require_file(path)
                files = [FoundImage(path.name, path, "", None)]
        except InputError as error:
            problems.append(error)
            continue
        for one in files:
            found.setdefault(one.path.resolve(), one)
    if not found:
        raise problems[0] if problems else InputError("images", "none given")
    first = paths[0].resolve()
    name = readable_name(first.name if first.is_dir() else first.parent.name) or "images"
    items, _ = _assign_ids(name, list(found.values()), pseudonymous=False)
    failures = [CaseFailure(readable_name(e.path.name), "find", e.rule, str(e.path), name) for e in problems]
    return Category(name, tuple(items)), failures, left_out


def _unlabelled_below(root: Path, left_out: LeftOut) -> Iterator[FoundImage]:
    """List the images to score below a folder. If VisA's split file exists, these are its test images."""
    if detect_layout(root) != "visa":
        yield from photographs(root, left_out)
        return
    labelling, data = Labelling(left_out=left_out), ImagesSettings(root=str(root))
    _, folders, single = _resolve_layout(root, "visa", labelling)
    for name, folder in folders.items():
        for one in _list_images(folder, "visa", data, labelling):
            if one.key and one.path.is_file():
                yield FoundImage(one.key if single else f"{name}/{one.key}", one.path, "", None)


def detect_layout(root: Path) -> Literal["mvtec", "visa", "folder"]:
    """Return the layout of a folder of images, detected from the names of its folders."""
    kinds: tuple[Literal["visa", "mvtec"], ...] = ("visa", "mvtec")
    for layout in kinds:
        if is_category(root, layout) or category_folders(root, layout):
            return layout
    return "folder"


def _list_images(folder: Path, reader: _Reader, data: ImagesSettings, labelling: Labelling) -> Iterator[FoundImage]:
    """List the test images of one category's folder."""
    if isinstance(reader, Layout):
        yield from public_set_images(reader, folder / reader.test)
    elif reader == "mvtec":
        yield from mvtec_images(folder, labelling)
    elif reader == "visa":
        split = split_file(folder, data)
        yield from visa_images(folder, labelling) if split is None else visa_split_images(split, folder, part="test")
    else:
        yield from plain_images(folder, data.masks, labelling)


def _assign_ids(category: str, found: list[FoundImage], *, pseudonymous: bool) -> tuple[list[Item], list[CaseFailure]]:
    """Assign ids: the key without its suffix if that is unique, else the key. Equal keys get the endings -2, -3, ..."""
    stems = Counter(str(Path(key).with_suffix("")) for key in {each.key for each in found})
    taken: set[str] = set()
    items: list[Item] = []
    problems: list[CaseFailure] = []
    for each in sorted(found, key=lambda f: (natural_order(f.key), f.path)):
        stem = str(Path(each.key).with_suffix(""))
        wanted = readable_name(stem if stems[stem] == 1 else each.key)
        name = wanted
        number = 2
        while name in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name)
        defect = readable_name(each.defect)
        if pseudonymous:
            digest = hashlib.sha256(f"{category}/{name}".encode()).hexdigest()
            name, defect = f"image-{digest[:_DIGEST_CHARACTERS]}", "anomalous" if each.anomalous else "good"
        if each.rule is None:
            items.append(Item(name, each.path, each.anomalous, defect if each.anomalous is not None else "", each.mask))
        else:
            # the text after the colon may contain file names, which pseudonyms must hide
            rule = each.rule.split(":")[0] if pseudonymous else readable_name(each.rule)
            problems.append(CaseFailure(f"{category}/{name}", "find", rule, str(each.path), category))
    return items, problems
