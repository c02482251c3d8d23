"""Square tiles over the instances of an object, and their predictions laid together again (003, section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from zsad.scorers.segmentation.foreground import Component


@dataclass(frozen=True)
class Tile:
    """A square of an image, px. Where the image is smaller than the square, it reaches over the image's borders."""

    top: int
    left: int
    side: int


def place_tiles(
    component: Component, image_hw: tuple[int, int], *, min_side_px: int, long_aspect: float, many_parts: int
) -> tuple[Tile, ...]:
    """The tiles that one component is looked at in.

    One square centred on the component, whose side is its larger extent; or, for a component longer than `long_aspect`
    times its short side and of more than `many_parts` parts, squares of its short side along its length, in steps of
    half the short side (the last step may be shorter). Then every pixel row (or column) of its length is in the middle
    half of one of them. No tile is smaller than `min_side_px`, since models would have to enlarge it.

    A tile that would reach over a border of the image is moved inside, so that within a quarter of a tile of the border
    only the outer part of a tile is left. Along an axis on which the image is smaller than the tile, the tile covers
    all of it; `cut_tile` fills the rest.

    Parameters
    ----------
    component
        On the image of `image_hw`, height and width in px.
    min_side_px
        003: 352, the input of CLIPSeg.
    long_aspect, many_parts
        003: 1.5 and 20; a component has to exceed both.
    """
    short, long = sorted((component.height, component.width))
    lengthwise = long > long_aspect * short and component.parts > many_parts
    side = max(short if lengthwise else long, min_side_px)
    tops = [_centred(component.top, component.bottom, side)]
    lefts = [_centred(component.left, component.right, side)]
    if lengthwise:
        step = max(1, short // 2)
        if component.height > component.width:
            tops = _starts_along(component.top, component.bottom, side, step)
        else:
            lefts = _starts_along(component.left, component.right, side, step)
    height, width = image_hw
    placed = (
        Tile(_moved_inside(top, side, height), _moved_inside(left, side, width), side) for top in tops for left in lefts
    )
    return tuple(dict.fromkeys(placed))


def _centred(start: int, stop: int, side: int) -> int:
    return (start + stop - side) // 2


def _starts_along(start: int, stop: int, side: int, step: int) -> list[int]:
    """Starts of tiles whose middle halves together cover start..stop: the first begins there, the last ends there."""
    quarter = side // 4
    first, last = start - quarter, stop - side + quarter
    if last <= first:
        return [_centred(start, stop, side)]
    return [*range(first, last, step), last]


def _moved_inside(start: int, side: int, length: int) -> int:
    """The start nearest to `start` from which a tile lies in 0..length, or covers it where it is shorter."""
    return min(max(start, min(0, length - side)), max(0, length - side))


def cut_tile(image: UInt8[ndarray, "H W 3"], tile: Tile) -> UInt8[ndarray, "S S 3"]:
    """The pixels of a tile, S = its side. Over a border the image goes on as its own mirror image.

    A square cut this way shows the object in its own proportions, and no frame that could pass for a defect.
    """
    height, width = image.shape[:2]
    rows, columns = _reflected(tile.top, tile.side, height), _reflected(tile.left, tile.side, width)
    pixels: UInt8[ndarray, "S S 3"] = image[np.ix_(rows, columns)]
    return pixels


def _reflected(start: int, side: int, length: int) -> Int64[ndarray, " side"]:
    place = np.arange(start, start + side, dtype=np.int64) % (2 * length)
    return np.where(place < length, place, 2 * length - 1 - place)


def merge_tiles(
    predictions: Iterable[tuple[Tile, Float[ndarray, "S S"]]], image_hw: tuple[int, int]
) -> Float32[ndarray, "H W"]:
    """Lay the tiles' maps on the image; pixels of several tiles take their mean, pixels of none are 0.

    What lies over a border is dropped. Taken in one by one, so that only one map is held at a time.
    """
    total, count = np.zeros(image_hw, dtype=np.float64), np.zeros(image_hw, dtype=np.int64)
    for tile, values in predictions:
        top, left = max(tile.top, 0), max(tile.left, 0)
        inside = values[top - tile.top :, left - tile.left :][: image_hw[0] - top, : image_hw[1] - left]
        place = np.s_[top : top + inside.shape[0], left : left + inside.shape[1]]
        total[place] += inside
        count[place] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)


def harmonic_mean(probabilities: Float[Tensor, "P h w"]) -> Float[Tensor, "h w"]:
    """Of each pixel over the prompts: high only where all prompts are; 0 where one is 0. Probabilities are 0..1."""
    return len(probabilities) / probabilities.reciprocal().sum(dim=0)


def mean_of_highest(scores: Sequence[float], share: float) -> float:
    """Mean of the highest `share` (0..1) of the scores, rounded down to a whole number of them, but of one at least."""
    # so that a product such as 0.29 * 100 is not taken for less than the whole number it stands for
    count = max(1, math.floor(share * len(scores) + 1e-9))
    return sum(sorted(scores, reverse=True)[:count]) / count
