"""Read masks, and find the mask of an image by its name.

People and programs name masks in several ways. A mask of `x.png` may be called `x_mask.png`, `x.png`, `x_gt.png`,
`mask_x.png` or `x.jpg.png`. Or a folder `x` holds several masks, whose union is the mask (MVTec LOCO).
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from medad.base.errors import InputError
from zsad.data.images import FORMATS, IMAGE_SUFFIXES, MASK_SUFFIXES, decode, flatten
from zsad.data.listing import files_in, folders_in

MASK_FOLDERS = frozenset(
    (
        "ground_truth",
        "groundtruth",
        "ground-truth",
        "ground truth",
        "gt",
        "mask",
        "masks",
        "segmentation",
        "annotations",
    )
)
"""Names of folders that hold masks, in lower case."""
INVERTED_ABOVE = 0.5
"""Share of an image above which a mask may be inverted."""

_MARK = "(?:mask|masks|gt|label|labels|seg|segmentation|ground[_ -]?truth|annotation|anno)"
_MARKED = re.compile(rf"{_MARK}[_. -]+(?P<after>.+)|(?P<before>.+?)[_. -]+{_MARK}", re.IGNORECASE | re.DOTALL)
_MASK_FORMATS = (*FORMATS, "GIF")
_LOSSY_ABOVE = 127
_JPEG = frozenset({"JPEG", "MPO"})
_MAY_BE_LOSSY = frozenset({"WEBP", "AVIF", "HEIF"})
_BLACK = (0, 0, 0, 255)
_ORIENTATION = 274


def read_mask(path: Path, shape_hw: tuple[int, int], image: Path | None = None) -> Bool[np.ndarray, "H W"]:
    """Read a mask: True (anomalous) for each pixel that is not black.

    In a palette image the colour counts, not its number, and transparent pixels are black. In a JPEG, and in another
    lossy file with more than two values, a pixel must be brighter than half. Compression makes nearly black pixels
    around each outline. EXIF orientation is applied.

    Parameters
    ----------
    path
        Mask file. Or a folder of masks of one image, whose union is returned.
    shape_hw
        Height and width of the image after its EXIF orientation is applied.
    image
        Image file, whose EXIF orientation is named if the mask has the size of the unturned image.

    Raises
    ------
    InputError
        As `zsad.data.images.read_image`, or the mask's height and width are not those of its image.
    """
    mask = load_mask(path)
    if mask.shape == shape_hw:
        return mask
    rule = f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its image {shape_hw[1]} x {shape_hw[0]}"
    if image is not None and mask.shape == shape_hw[::-1] and (turned := exif_orientation(image)) > 1:
        rule += f", turned by its EXIF orientation {turned}; turn the mask as a viewer shows the image"
    raise InputError(path, rule)


def load_mask(path: Path) -> Bool[np.ndarray, "H W"]:
    """Read a mask of any size, or the union of a folder of masks; see `read_mask`. Raises InputError."""
    if not path.is_dir():
        return decode(path, to_mask, _MASK_FORMATS)
    parts = [decode(file, to_mask, _MASK_FORMATS) for file in mask_files(path)]
    if not parts:
        raise InputError(path, "contains no mask")
    if len({part.shape for part in parts}) > 1:
        raise InputError(path, "contains masks of different sizes")
    return np.asarray(np.logical_or.reduce(parts))


def mask_files(path: Path) -> list[Path]:
    """Return the files of a mask: the file itself, or the masks in a folder. Raises InputError."""
    return files_in(path, MASK_SUFFIXES) if path.is_dir() else [path]


def to_mask(image: Image.Image, path: Path) -> Bool[np.ndarray, "H W"]:
    """Return which pixels of an opened image are not black, see `read_mask`. Use it with `decode`."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise InputError(path, "the mask contains NaN or infinite values")
    else:
        values = np.asarray(flatten(image, _BLACK)).max(axis=2)
    lossy = image.format in _JPEG or (image.format in _MAY_BE_LOSSY and np.unique(values).size > 2)
    return np.asarray(values > (_LOSSY_ABOVE if lossy else 0))


def check_mask(mask: Bool[np.ndarray, "H W"], path: Path) -> None:
    """Check the mask of an anomalous image. Raises InputError if it is black, or covers the whole image."""
    if not mask.any():
        raise InputError(path, "the image is labelled anomalous, but its mask is black")
    if mask.all():
        raise InputError(path, "the mask covers the whole image; normal pixels must be black")


def mask_note(mask: Bool[np.ndarray, "H W"], path: Path, image: Path) -> str | None:
    """Return what is odd about a mask that can be used: it may be inverted, or not turned as its image. None: nothing.

    Equal oddities have equal notes, so that they can be counted.
    """
    if mask.mean() > INVERTED_ABOVE:
        return "More than half of the image is anomalous in the mask, which may be inverted"
    turned = exif_orientation(image)
    # a mask of another shape than the unturned image must have been drawn on the turned one
    if turned in {2, 3, 4} or (turned > 1 and mask.shape[0] == mask.shape[1]):
        own = exif_orientation(mask_files(path)[0])
        return None if own > 1 else "EXIF orientation turns the image, but not its mask, which has none"
    return None


def exif_orientation(path: Path) -> int:
    """Return the EXIF orientation of an image file, 1 to 8. 1: upright, or unknown."""
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def bare_stem(stem: str) -> str:
    """Return the stem of the image that a mask's stem names, in lower case: `x` for `x_mask`, `MASK_x` or `x.png`."""
    marked = _MARKED.fullmatch(stem)
    bare = stem if marked is None else marked["after"] or marked["before"]
    name = Path(bare)
    return (name.stem if name.suffix.lower() in IMAGE_SUFFIXES else bare).lower()


def is_marked_mask(stem: str, images: Collection[str]) -> bool:
    """Return whether a stem marks a mask of one of the images, whose stems are in lower case."""
    return bare_stem(stem) != stem.lower() and bare_stem(stem) in images


class MaskFolder:
    """The masks in some folders, found by the stem of their image.

    Parameters
    ----------
    folders
        Folders to search, not at depth.
    images
        Stems of all images whose masks may be there.
    """

    def __init__(self, folders: Sequence[Path], images: Collection[str]) -> None:
        own = {stem.lower() for stem in images}
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        self._names: list[str] = []
        for folder in folders:
            for path in [*files_in(folder, MASK_SUFFIXES), *folders_in(folder)]:
                stem = path.name if path.is_dir() else path.stem
                if path.is_dir() and not (stem.lower() in own and mask_files(path)):
                    continue
                # a mask that bears the name of an image is that image's, even if the name looks marked
                self._by_stem[stem.lower() if stem.lower() in own else bare_stem(stem)].append(path)
                self._names.append(path.name)

    def find(self, stem: str) -> list[Path]:
        """Return all masks of the image with this stem."""
        return self._by_stem.get(stem.lower(), [])

    def example(self, stem: str) -> str:
        """Return the name of a mask that lies there, one that contains the stem if possible. Empty: no mask."""
        return next((name for name in self._names if stem.lower() in name.lower()), next(iter(self._names), ""))
