"""Features of the voxels of a liver, on the stack of its prepared slices.

All lengths are in mm, so that stacks of different spacing give comparable features. All averages use liver voxels only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.base.robust import robust_sd

SCALES_MM = (0.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0)
"""Standard deviations of the Gaussian means. 0 is the prepared slice itself."""
DIFFERENCES_MM = ((0.0, 8.0), (3.0, 12.0), (5.0, 20.0), (8.0, 30.0))
"""Pairs of scales with the difference of their means as a feature."""
SPREADS_MM = (4.0, 8.0)
"""Standard deviations of the Gaussian windows of the local standard deviation."""
HESSIANS_MM = (4.0, 8.0)
"""Scales of the Hessian's eigenvalues."""
TOP_HATS_MM = (8.0, 16.0)
"""Side of the cube of the top-hat transforms."""
SURROUNDINGS_MM = 12.0
"""Standard deviation of the Gaussian window of the share of liver around a voxel."""

NAMES = (
    *(f"mean_{mm:g}" for mm in SCALES_MM),
    *(f"deviation_{mm:g}" for mm in SCALES_MM),
    *(f"difference_{a:g}_{b:g}" for a, b in DIFFERENCES_MM),
    *(f"spread_{mm:g}" for mm in SPREADS_MM),
    *(f"hessian_{mm:g}_{order}" for mm in HESSIANS_MM for order in ("low", "middle", "high")),
    *(f"{kind}_top_hat_{mm:g}" for mm in TOP_HATS_MM for kind in ("white", "black")),
    "depth_mm",
    "liver_share",
    "noise_hu",
    "liver_spread_hu",
)
"""Names of the features, in the order of the columns."""

_COARSE_FROM = 3.0
"""Standard deviation in voxels from which a Gaussian mean is computed on a coarser grid."""
_MARGIN = 2
"""Number of voxels around the liver's bounding box."""


@dataclass(frozen=True)
class LiverStack:
    """A liver in HU relative to its median, on consecutive planes.

    Attributes
    ----------
    hu
        HU minus the median HU of the liver.
    organ
        Liver mask.
    spacing_mm
        Distance between planes, pixel size along rows, pixel size along columns.
    """

    hu: Float32[ndarray, "P S S"]
    organ: Bool[ndarray, "P S S"]
    spacing_mm: tuple[float, float, float]

    @cached_property
    def depth_mm(self) -> Float32[ndarray, "P S S"]:
        """Return the distance to the liver's surface. The first and the last plane of the stack are not a surface."""
        depth = np.zeros(self.organ.shape, np.float32)
        box = self.box()
        inside = np.pad(self.organ[box], ((0, 0), (1, 1), (1, 1)))
        depth[box] = ndimage.distance_transform_edt(inside, sampling=self.spacing_mm)[:, 1:-1, 1:-1]
        return depth

    @cached_property
    def liver_share(self) -> Float32[ndarray, "P S S"]:
        """Return the share of liver around each voxel."""
        return _Mean(self.organ.astype(np.float32), None, SURROUNDINGS_MM, self.spacing_mm).values

    def with_hu(self, hu: Float32[ndarray, "P S S"]) -> LiverStack:
        """Return the same liver with other HU."""
        other = LiverStack(hu, self.organ, self.spacing_mm)
        other.__dict__.update({name: getattr(self, name) for name in ("depth_mm", "liver_share")})
        return other

    def box(self) -> tuple[slice, ...]:
        """Return the bounding box of the liver with a small margin."""
        found = ndimage.find_objects(self.organ.astype(np.uint8))[0]
        return tuple(
            slice(max(part.start - _MARGIN, 0), min(part.stop + _MARGIN, n))
            for part, n in zip(found, self.organ.shape, strict=True)
        )


def voxel_features(
    stack: LiverStack, chosen: Bool[ndarray, "P S S"] | None = None
) -> Float32[ndarray, "voxels features"]:
    """Return the features of liver voxels, in C order of the stack.

    Parameters
    ----------
    stack
        The liver.
    chosen
        Liver voxels to return. None: all.
    """
    box = stack.box()
    organ, spacing = stack.organ[box], stack.spacing_mm
    wanted = organ if chosen is None else chosen[box]
    hu = _relative_hu(stack, box)
    columns = np.empty((len(NAMES), np.count_nonzero(wanted)), np.float32)
    row = iter(columns)
    means = {mm: _Mean(hu, organ, mm, spacing) for mm in sorted({*SCALES_MM, *SPREADS_MM, *HESSIANS_MM})}
    values = {mm: mean.values for mm, mean in means.items()}
    for mm in SCALES_MM:
        next(row)[:] = values[mm][wanted]
    spreads = {mm: _spread_hu(values[mm][organ]) for mm in SCALES_MM}
    for mm in SCALES_MM:
        next(row)[:] = values[mm][wanted] / spreads[mm]
    for fine, coarse in DIFFERENCES_MM:
        next(row)[:] = values[fine][wanted] - values[coarse][wanted]
    for mm in SPREADS_MM:
        square = _Mean(hu * hu, organ, mm, spacing).values[wanted]
        next(row)[:] = np.sqrt(np.maximum(square - values[mm][wanted] ** 2, 0))
    for mm in HESSIANS_MM:
        for eigenvalue in _hessian_eigenvalues(values[mm], wanted, mm, spacing):
            next(row)[:] = eigenvalue
    # outside the liver a wide mean is the best guess, so that the surface is not an edge
    filled = np.where(organ, values[3.0], values[12.0])
    for mm in TOP_HATS_MM:
        size = _top_hat_size(mm, spacing)
        opened = ndimage.grey_opening(filled, size=size)
        next(row)[:] = (filled - opened)[wanted]
        closed = ndimage.grey_closing(filled, size=size)
        next(row)[:] = (closed - filled)[wanted]
    next(row)[:] = stack.depth_mm[box][wanted]
    next(row)[:] = stack.liver_share[box][wanted]
    next(row)[:] = _spread_hu((hu - values[3.0])[organ])
    next(row)[:] = spreads[5.0]
    return np.ascontiguousarray(columns.T)


def bright_parts_and_noise(stack: LiverStack) -> tuple[Float32[ndarray, " voxels"], float]:
    """Return two of the features alone: the widest white top-hat of all liver voxels, and the noise in HU.

    They are equal to those of `voxel_features`, which takes several times as long.
    """
    box = stack.box()
    organ, spacing = stack.organ[box], stack.spacing_mm
    hu = _relative_hu(stack, box)
    fine, wide = (_Mean(hu, organ, mm, spacing).values for mm in (3.0, 12.0))
    filled = np.where(organ, fine, wide)
    opened = ndimage.grey_opening(filled, size=_top_hat_size(TOP_HATS_MM[-1], spacing))
    return (filled - opened)[organ], _spread_hu((hu - fine)[organ])


def _relative_hu(stack: LiverStack, box: tuple[slice, ...]) -> Float32[ndarray, "z y x"]:
    """Return HU in a box relative to the liver's median, and 0 outside the liver."""
    middle = np.float32(np.median(stack.hu[stack.organ]))
    return np.where(stack.organ[box], stack.hu[box] - middle, np.float32(0))


def _top_hat_size(side_mm: float, spacing_mm: tuple[float, float, float]) -> list[int]:
    """Return the odd numbers of voxels of a cube."""
    return [max(1, 2 * round(side_mm / 2 / step) + 1) for step in spacing_mm]


class _Mean:
    """Gaussian mean over liver voxels, defined also around the liver. Without an organ: over all voxels."""

    def __init__(
        self,
        hu: ndarray,
        organ: Bool[ndarray, "z y x"] | None,
        sigma_mm: float,
        spacing: tuple[float, float, float],
    ) -> None:
        if sigma_mm == 0:
            self.values = hu
            return
        sigma = np.array([sigma_mm / step for step in spacing])
        factor = np.maximum((sigma / _COARSE_FROM).astype(int), 1)

        def blur(values: ndarray) -> ndarray:
            values = _block_sum(values, factor) if (factor > 1).any() else values
            return np.asarray(ndimage.gaussian_filter(values, sigma / factor, mode="constant", truncate=3))

        weight = blur(np.ones(hu.shape, np.float32) if organ is None else organ.astype(np.float32))
        total = blur(hu if organ is None else np.where(organ, hu, np.float32(0)))
        mean = np.where(weight > 1e-6, total / np.maximum(weight, 1e-6), np.float32(0))
        self.values = _expand(mean, factor, hu.shape) if (factor > 1).any() else mean


def _block_sum(values: ndarray, factor: ndarray) -> ndarray:
    """Sum blocks of voxels; incomplete blocks at the ends are padded with zeros."""
    padded = np.pad(values, [(0, -n % f) for n, f in zip(values.shape, factor, strict=True)])
    for axis, f in enumerate(factor):
        padded = np.add.reduceat(padded, np.arange(0, padded.shape[axis], f), axis=axis)
    return padded


def _expand(coarse: ndarray, factor: ndarray, shape: tuple[int, ...]) -> ndarray:
    """Interpolate block values linearly to voxels."""
    values = coarse
    for axis, (f, n) in enumerate(zip(factor, shape, strict=True)):
        if f == 1:
            continue
        place = np.clip((np.arange(n) + 0.5) / f - 0.5, 0, values.shape[axis] - 1).astype(np.float32)
        low = np.minimum(place.astype(int), max(values.shape[axis] - 2, 0))
        high = np.minimum(low + 1, values.shape[axis] - 1)
        part = (place - low).reshape([-1 if at == axis else 1 for at in range(values.ndim)])
        values = np.take(values, low, axis) * (1 - part) + np.take(values, high, axis) * part
    return values.astype(np.float32)


def _hessian_eigenvalues(
    values: ndarray, wanted: Bool[ndarray, "z y x"], sigma_mm: float, spacing: tuple[float, float, float]
) -> Float32[ndarray, "3 voxels"]:
    """Return the eigenvalues of sigma² times the Hessian, in HU, ascending."""
    matrix = np.empty((np.count_nonzero(wanted), 3, 3), np.float32)
    for i in range(3):
        first = _derivative(values, i, spacing[i])
        for j in range(i, 3):
            matrix[:, i, j] = matrix[:, j, i] = _derivative(first, j, spacing[j])[wanted] * sigma_mm**2
    return np.asarray(np.linalg.eigvalsh(matrix).T)


def _derivative(values: ndarray, axis: int, step: float) -> ndarray:
    kernel = np.array([-0.5, 0, 0.5], np.float32) / step
    return np.asarray(ndimage.correlate1d(values, kernel, axis=axis, mode="nearest"))


def _spread_hu(hu: Float32[ndarray, " voxels"]) -> float:
    """Return the robust standard deviation in HU, at least 0.5."""
    return max(robust_sd(hu), 0.5)


assert all(fine < coarse for fine, coarse in pairwise(SCALES_MM))
