"""Square tiles that cover the instances of an object, and merging of their maps.

The method is that of Baugh et al., Zero-Shot Anomaly Detection with Pre-trained Segmentation Models, 2023; section 2.
"""

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
    """A square of an image, px. If the image is smaller than the square, the square extends beyond its borders."""

    top: int
    left: int
    side: int


def place_tiles(
    component: Component, image_hw: tuple[int, int], *, min_side_px: int, long_aspect: float, many_parts: int
) -> tuple[Tile, ...]:
    """Return the tiles that cover one component.

    Usually this is one square, centred on the component, with its larger extent as side. A component with many parts
    that is also long gets several squares along its length. The side of these squares is the short side of the
    component, or `min_side_px` if that is larger. They are half a short side apart; the last distance may be smaller.
    Then every pixel row (or column) along the length is in the middle half of a tile.
    No tile is smaller than `min_side_px`, because models would have to enlarge it.

    A tile that extends beyond a border of the image is moved inside. So within a quarter of a tile from the border,
    pixels are only in the outer part of a tile. If the image is smaller than the tile along an axis, the tile covers
    that axis completely, and `cut_tile` fills the rest.

    Parameters
    ----------
    component
        Component on the image of `image_hw`, height and width in px.
    min_side_px
        Smallest side of a tile. The paper uses 352, the input size of CLIPSeg.
    long_aspect, many_parts
        Largest aspect ratio and number of parts for a single tile. A component that exceeds both gets several tiles.
        The paper uses 1.5 and 20.
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
    """Return starts of tiles with middle halves that together cover start..stop."""
    quarter = side // 4
    first, last = start - quarter, stop - side + quarter
    if last <= first:
        return [_centred(start, stop, side)]
    return [*range(first, last, step), last]


def _moved_inside(start: int, side: int, length: int) -> int:
    """Return the start nearest to `start` with the tile inside 0..length, or covering it if the image is shorter."""
    return min(max(start, min(0, length - side)), max(0, length - side))


def cut_tile(image: UInt8[ndarray, "H W 3"], tile: Tile) -> UInt8[ndarray, "S S 3"]:
    """Return the pixels of a tile of side S. Beyond a border, the image is continued by reflection.

    So the tile shows the object in its own proportions, without a frame that could look like a defect.
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
    """Merge the tiles' maps into a map of the image. Overlapping tiles are averaged; pixels outside all tiles are 0.

    Parts beyond the image's borders are dropped. Maps are consumed one by one, so only one is in memory at a time.
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
    """Return the harmonic mean over the prompts for each pixel, from probabilities 0..1.

    It is high only if all prompts are high, and 0 if one prompt is 0.
    """
    return len(probabilities) / probabilities.reciprocal().sum(dim=0)


def mean_of_highest(scores: Sequence[float], share: float) -> float:
    """Return the mean of the highest `share` (0..1) of the scores. Their number is rounded down, but at least one."""
    # 1e-9: a product such as 0.29 * 100 is slightly below the whole number because of rounding
    count = max(1, math.floor(share * len(scores) + 1e-9))
    return sum(sorted(scores, reverse=True)[:count]) / count
