"""The coarse grid, on which the liver is looked for, and the way back to the scan's grid.

A coarse volume covers the whole scan: its n voxels along an axis have the length of the scan divided by n. Only a few
planes of the scan are copied at a time, so a scan of 1,000 slices needs little more memory than it has already.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float32
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

CHUNK_PLANES = 32
RANGE_HU = (-1024.0, 1500.0)


def coarse_shape(shape: tuple[int, ...], spacing_mm: tuple[float, ...], size_mm: float) -> tuple[int, int, int]:
    """Return the number of coarse voxels along each axis, for voxels of about `size_mm`."""
    x, y, z = (max(1, round(n * step / size_mm)) for n, step in zip(shape, spacing_mm, strict=True))
    return x, y, z


def to_coarse(
    values: Float32[ndarray, "X Y Z"] | Bool[ndarray, "X Y Z"], shape: tuple[int, int, int]
) -> Float32[ndarray, "A B C"]:
    """Return values on a coarse grid of `shape`: means where it is coarser, interpolated where it is finer.

    Values are clipped to -1024..1500, the HU that matter.
    """
    parts = [_resize_planes(chunk, shape[0], shape[1]) for chunk in _chunks(values)]
    planes = torch.cat(parts)  # [Z, A, B]
    columns = planes.permute(1, 2, 0).reshape(1, -1, planes.shape[0])
    if shape[2] <= columns.shape[2]:
        columns = functional.adaptive_avg_pool1d(columns, shape[2])
    else:
        columns = functional.interpolate(columns, size=shape[2], mode="linear", align_corners=False)
    result: ndarray = columns.reshape(shape).numpy()
    return result


def _chunks(values: ndarray) -> Iterator[Float32[Tensor, "n X Y"]]:
    for start in range(0, values.shape[2], CHUNK_PLANES):
        part = np.moveaxis(values[:, :, start : start + CHUNK_PLANES], 2, 0).astype(np.float32)
        yield torch.from_numpy(np.ascontiguousarray(np.clip(part, *RANGE_HU)))


def _resize_planes(planes: Float32[Tensor, "n X Y"], x: int, y: int) -> Float32[Tensor, "n A B"]:
    small = functional.adaptive_avg_pool2d(planes[None], (min(x, planes.shape[1]), min(y, planes.shape[2])))
    if small.shape[2:] != (x, y):
        small = functional.interpolate(small, size=(x, y), mode="bilinear", align_corners=False)
    return small[0]


def above_on_grid(
    level: Float32[ndarray, "A B C"], shape: tuple[int, int, int], threshold: float = 0.0
) -> Bool[ndarray, "X Y Z"]:
    """Return where a coarse `level`, interpolated linearly on the scan's grid of `shape`, is above `threshold`."""
    result = np.zeros(shape, dtype=np.bool_)
    depth = level.shape[2]
    place = np.clip((np.arange(shape[2]) + 0.5) * depth / shape[2] - 0.5, 0, depth - 1)
    below = np.minimum(np.floor(place).astype(int), max(depth - 2, 0))
    for start in range(0, shape[2], CHUNK_PLANES):
        z = slice(start, min(start + CHUNK_PLANES, shape[2]))
        low, weight = below[z], (place[z] - below[z]).astype(np.float32)
        planes = level[:, :, low] * (1 - weight) + level[:, :, np.minimum(low + 1, depth - 1)] * weight
        stack = torch.from_numpy(np.ascontiguousarray(np.moveaxis(planes, 2, 0)))[None]
        full = functional.interpolate(stack, size=shape[:2], mode="bilinear", align_corners=False)[0]
        result[:, :, z] = np.moveaxis((full > threshold).numpy(), 0, 2)
    return result
