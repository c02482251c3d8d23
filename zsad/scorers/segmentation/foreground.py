"""Where the objects of an image are (003, section 2, foreground extraction): segments filtered by a second opinion.

SAM cuts an image into segments of anything; a dichotomous segmentation says what stands out, shadows included. Segments
that lie in it form the foreground, and each connected component of the foreground is one instance of the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from scipy import ndimage

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Component:
    """Bounding box of one connected component of the foreground, px; `bottom` and `right` lie just outside."""

    top: int
    left: int
    bottom: int
    right: int
    parts: int
    """Segments in it."""

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


def covered_segments(
    segments: Sequence[Bool[ndarray, "H W"]], dichotomous: Bool[ndarray, "H W"], covered: float
) -> list[Bool[ndarray, "H W"]]:
    """The segments of which the share `covered` (0..1) of their own area, or more, lies in the dichotomous mask.

    003: 80 %, since a shadow, part of which the mask takes in, is mostly a segment of its own. Empty ones are left out.
    """
    foreground_segments = []
    for segment in segments:
        area = np.count_nonzero(segment)
        if area and np.count_nonzero(segment & dichotomous) / area >= covered:
            foreground_segments.append(segment)
    return foreground_segments


def find_components(
    segments: Sequence[Bool[ndarray, "H W"]], dichotomous: Bool[ndarray, "H W"], covered: float
) -> tuple[Component, ...]:
    """The connected components of the foreground, which is the union of the `covered_segments`.

    Pixels that touch at a corner are connected. A segment counts as a part of every component that it has a pixel in,
    since a segment need not be connected itself. Without any foreground the whole image is one component, of no parts:
    an image in which nothing stands out, such as a texture, is judged as one object.

    Parameters
    ----------
    segments
        SAM's, overlapping or not, in any order.
    dichotomous
        What stands out of the image.
    covered
        See `covered_segments`.

    Returns
    -------
    tuple of Component
        In the order of their first pixels, row by row; one at least.
    """
    foreground_segments = covered_segments(segments, dichotomous, covered)
    height, width = dichotomous.shape
    if not foreground_segments:
        return (Component(0, 0, height, width, parts=0),)
    labels, count = ndimage.label(np.logical_or.reduce(foreground_segments), structure=_EIGHT_NEIGHBOURS)
    parts = [0] * (count + 1)
    for segment in foreground_segments:
        for label in np.unique(labels[segment]):
            parts[label] += 1
    return tuple(
        Component(rows.start, columns.start, rows.stop, columns.stop, parts[label])
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1)
    )


def scale_component(component: Component, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> Component:
    """The same box on the image at another height and width; every pixel that it touches there is in it."""
    (height, width), (new_height, new_width) = from_hw, to_hw
    return Component(
        top=component.top * new_height // height,
        left=component.left * new_width // width,
        bottom=-(-component.bottom * new_height // height),
        right=-(-component.right * new_width // width),
        parts=component.parts,
    )
