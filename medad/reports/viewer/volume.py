"""A scan and its overlays in a form that is small enough for a page: 8 bits, cropped to the body, halved if needed.

HU are stored with unequal steps: 2.8 HU in soft tissue, 20 HU in lung, 49 HU in bone. So every usual window is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from medad.base.boxes import Box, bounding_box
from medad.evaluation.postprocess import label_lesions

HU_KNOTS, BYTE_KNOTS = (-1024.0, -200.0, 300.0, 2000.0), (0.0, 41.0, 220.0, 255.0)
"""HU and their bytes; between them both are linear."""
BODY_HU = -500.0
MARGIN = 4
MOST_VOXELS = 16_000_000
"""Largest number of voxels of a page. CT compresses to about 0.6 bytes a voxel, and base64 takes a third more."""


@dataclass(frozen=True)
class ShownVolume:
    """The part of a case that a page shows. All arrays have one shape, in canonical LPS order."""

    grey: UInt8[ndarray, "X Y Z"]
    """HU by `HU_KNOTS` and `BYTE_KNOTS`."""
    liver: Bool[ndarray, "X Y Z"]
    lesions: UInt8[ndarray, "X Y Z"]
    """Number of the predicted lesion, as in the lesion table. 255: the 255th and all smaller ones. 0: none."""
    truth: Bool[ndarray, "X Y Z"] | None
    probability: UInt8[ndarray, "X Y Z"]
    """Probability of tumour inside the liver, 0..255."""
    spacing_mm: tuple[float, float, float]
    first_plane: int
    """Number in the scan of the first plane, from 0 at the feet."""


def shown_volume(
    hu: Float32[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    prediction: Bool[ndarray, "X Y Z"],
    truth: Bool[ndarray, "X Y Z"] | None,
    probability: Float32[ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    most_voxels: int = MOST_VOXELS,
) -> ShownVolume:
    """Return the volume for the page. Planes are kept. Within them, blocks of pixels are averaged if there are many.

    Masks are sampled at the middle of the blocks.
    """
    box = _body_box(hu, liver)
    numbers = np.zeros(hu.shape, np.uint8)
    if (found := label_lesions(prediction)) is not None:
        part, ids = found
        numbers[part] = np.minimum(ids, 255)
    planes = box[2].stop - box[2].start
    step = 1
    while planes * np.prod([(each.stop - each.start) // step for each in box[:2]]) > most_voxels:
        step += 1
    middle = slice(step // 2, None, step)

    def cut(values: ndarray) -> ndarray:
        sampled: ndarray = values[box][middle, middle]
        count = [(each.stop - each.start) // step for each in box[:2]]
        return np.ascontiguousarray(sampled[: count[0], : count[1]])

    grey = np.interp(_block_means(hu[box], step), HU_KNOTS, BYTE_KNOTS)
    inside = cut(liver)
    shown = np.where(inside, np.nan_to_num(cut(probability)), 0.0)
    return ShownVolume(
        grey=np.rint(grey).astype(np.uint8),
        liver=inside,
        lesions=cut(numbers),
        truth=None if truth is None else cut(truth),
        probability=np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8),
        spacing_mm=(spacing_mm[0] * step, spacing_mm[1] * step, spacing_mm[2]),
        first_plane=box[2].start,
    )


def _body_box(hu: Float32[ndarray, "X Y Z"], liver: Bool[ndarray, "X Y Z"]) -> Box:
    """Return a box around the body, and all planes."""
    rough = bounding_box(np.ascontiguousarray(hu[::4, ::4] > BODY_HU))
    organ = bounding_box(liver)
    sides = []
    for axis in range(2):
        low, high = 0, hu.shape[axis]
        if rough is not None:
            low, high = 4 * rough[axis].start - MARGIN, 4 * rough[axis].stop + MARGIN
        if organ is not None:
            low, high = min(low, organ[axis].start), max(high, organ[axis].stop)
        sides.append(slice(max(0, low), min(hu.shape[axis], high)))
    return sides[0], sides[1], slice(0, hu.shape[2])


def _block_means(values: Float32[ndarray, "X Y Z"], step: int) -> Float32[ndarray, "A B Z"]:
    if step == 1:
        return values
    a, b = values.shape[0] // step, values.shape[1] // step
    blocks = values[: a * step, : b * step].reshape(a, step, b, step, -1)
    means: ndarray = blocks.mean((1, 3), dtype=np.float32)
    return means
