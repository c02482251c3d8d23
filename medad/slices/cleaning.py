"""Cleaning of a liver mask: fat that a mask takes in at fissures, hilum and gallbladder bed is removed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.config.liver import PreprocessSettings

_SMOOTH_MM = 1.0
"""Standard deviation of the Gaussian that smooths HU before fat is looked for."""
_COARSE_MM = 1.2
"""Pixel size below which fat is looked for on every second pixel."""


def remove_fat(
    hu: Float32[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    settings: PreprocessSettings,
) -> Bool[ndarray, "X Y Z"]:
    """Return the mask without fat at the liver's surface and without the voxels near this fat.

    Smoothed voxels below `settings.fat_hu` are fat. Fat that does not reach the surface stays, because it may be part
    of a lesion. `settings.fat_margin_mm` is the distance from fat within which voxels are removed: they mix fat and
    liver. With `fat_hu` None the mask is returned as it is.
    """
    if settings.fat_hu is None or not liver.any():
        return liver
    box = tuple(
        slice(max(part.start - 1, 0), part.stop + 1) for part in ndimage.find_objects(liver.astype(np.uint8))[0]
    )
    steps = [2 if step < _COARSE_MM and axis < 2 else 1 for axis, step in enumerate(spacing_mm)]
    coarse = (slice(None, None, steps[0]), slice(None, None, steps[1]), slice(None, None, steps[2]))
    sizes = [step * factor for step, factor in zip(spacing_mm, steps, strict=True)]
    inside = liver[box][coarse]
    smooth = ndimage.gaussian_filter(hu[box][coarse], [_SMOOTH_MM / size for size in sizes], truncate=2)
    fat = inside & (smooth < settings.fat_hu)
    labels, count = ndimage.label(fat, structure=np.ones((3, 3, 3)))
    if count == 0:
        return liver
    # planes beyond the scan are not a surface
    surface = inside & ~ndimage.binary_erosion(inside, border_value=1)
    at_surface = np.unique(labels[surface & fat])
    fat &= np.isin(labels, at_surface[at_surface > 0])
    if not fat.any():
        return liver
    removed = ndimage.binary_dilation(fat, structure=_ball(settings.fat_margin_mm, sizes))
    whole = removed.repeat(steps[0], 0).repeat(steps[1], 1)[: liver[box].shape[0], : liver[box].shape[1]]
    cleaned = liver.copy()
    cleaned[box] &= ~whole
    return cleaned


def _ball(radius_mm: float, sizes_mm: Sequence[float]) -> Bool[ndarray, "x y z"]:
    """Return the voxels within a distance of a voxel."""
    reach = [int(radius_mm / size) for size in sizes_mm]
    axes = [np.arange(-r, r + 1) * size for r, size in zip(reach, sizes_mm, strict=True)]
    squares = axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2
    return np.asarray(squares <= radius_mm**2 * (1 + 1e-6))
