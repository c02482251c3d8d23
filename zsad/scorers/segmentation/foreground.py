"""Foreground extraction: find the objects of an image from two segmentations.

The method is that of Baugh et al., Zero-Shot Anomaly Detection with Pre-trained Segmentation Models, 2023; section 2.
SAM divides an image into segments of any kind. A dichotomous segmentation marks what is salient, including shadows.
Segments that lie mostly in the dichotomous mask form the foreground.
Each connected component of the foreground is one instance of the object.
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
    """Bounding box of one connected component of the foreground, px. `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int
    parts: int
    """Number of segments in it."""

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


def covered_segments(
    segments: Sequence[Bool[ndarray, "H W"]], dichotomous: Bool[ndarray, "H W"], covered: float
) -> list[Bool[ndarray, "H W"]]:
    """Return the segments with at least the share `covered` (0..1) of their area in the dichotomous mask.

    The paper uses 80 %. The mask can include part of a shadow, but a shadow is mostly a separate segment and is then
    removed. Empty segments are left out.
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
    """Return the connected components of the foreground, which is the union of the `covered_segments`.

    Pixels that touch at a corner are connected. A segment may be disconnected, so it counts as a part of every
    component in which it has a pixel. An image without foreground, such as a texture, is one component with no parts.

    Parameters
    ----------
    segments
        Segments from SAM, in any order; they may overlap.
    dichotomous
        Mask of what is salient in the image.
    covered
        See `covered_segments`.

    Returns
    -------
    tuple of Component
        At least one component, in the order of their first pixels, row by row.
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
    """Return the same box on the image at another height and width. It includes every pixel that it touches."""
    (height, width), (new_height, new_width) = from_hw, to_hw
    return Component(
        top=component.top * new_height // height,
        left=component.left * new_width // width,
        bottom=-(-component.bottom * new_height // height),
        right=-(-component.right * new_width // width),
        parts=component.parts,
    )
