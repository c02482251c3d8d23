"""Bounding boxes of masks, and the order of voxels in memory: both make work on a scan many times faster."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

Box = tuple[slice, slice, slice]


def memory_order(first: ndarray, *others: ndarray) -> tuple[ndarray, ...]:
    """Return views of arrays of one shape with their axes in the order of memory of the first, each forward."""
    forward = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in first.strides)
    axes = axes_by_stride(first)
    return tuple(each[forward].transpose(axes) for each in (first, *others))


def axes_by_stride(values: ndarray) -> list[int]:
    """Return an array's axes from the one with the largest steps in memory to the one with the smallest."""
    order: list[int] = np.argsort([-abs(stride) for stride in values.strides], kind="stable").tolist()
    return order


def bounding_box(mask: Bool[ndarray, "X Y Z"]) -> Box | None:
    """Return the smallest box that contains all True voxels. None: the mask is empty.

    Planes are combined in the order of memory, so a transposed view is as fast as an array.
    """
    order = axes_by_stride(mask)
    bits = mask.transpose(order).view(np.uint8)
    plane = np.bitwise_or.reduce(bits, axis=0)
    rows, columns = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
    if not rows.size:
        return None
    inner = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    planes = np.flatnonzero(bits[:, *inner].any(axis=(1, 2)))
    found = dict(zip(order, (slice(int(planes[0]), int(planes[-1]) + 1), *inner), strict=True))
    return found[0], found[1], found[2]
