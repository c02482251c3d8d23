"""Tissue that a liver mask must not take in: fat of the fissures and the hilum, and blood vessels beside the liver.

The built-in network's map of 4 mm does not separate them from liver. Masks drawn by hand often take in parts of them,
too, and the tumour model would mark these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

FAT_HU = (-140.0, -20.0)
FAT_ML = 0.3
"""Volume from which connected fat is left out."""
MIXED_MM, MIXED_SHARE = 3.0, 0.3
"""Distance from fat within which voxels mix fat and other tissue, and their share of the way from fat to the liver."""
BRIGHT_HU, VESSEL_MM = 35.0, 3.0
"""HU above the liver's, and smallest radius, of a vessel that is left out."""
EDGE_MM, EDGE_HU = 3.0, 21.0
"""Width of a vessel's edge around this radius, and its HU above the liver's."""
MOST_INSIDE = 0.6
"""Largest share of such a vessel inside the mask. A bright tumour lies inside it as a whole."""
SMOOTH_MM, COARSE_MM, MARGIN_MM = 1.0, 1.2, 20.0
"""Smoothing of HU in `without`, size of a voxel to which it goes at most, and margin around the mask."""


def without(
    tissue: Collection[str],
    hu: Float32[ndarray, "X Y Z"],
    mask: Bool[ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
) -> Bool[ndarray, "X Y Z"]:
    """Return a liver mask of any grid without some tissue: `fat`, `vessels` or both. Without either it is the mask.

    `hu` is in HU, and `spacing_mm` the size of a voxel.
    """
    if not tissue or not mask.any():
        return mask
    box = box_around(mask, [int(MARGIN_MM / step) for step in spacing_mm])
    x, y, z = (max(1, round(COARSE_MM / step)) for step in spacing_mm)
    inside = mask[box][::x, ::y, ::z]
    # a copy, so that the large array is freed
    smooth = ndimage.gaussian_filter(hu[box], [SMOOTH_MM / step for step in spacing_mm], truncate=3)[
        ::x, ::y, ::z
    ].copy()
    sizes_mm = (spacing_mm[0] * x, spacing_mm[1] * y, spacing_mm[2] * z)
    found = not_liver(inside, smooth, float(np.median(smooth[inside])), sizes_mm, tissue)
    result = mask.copy()
    part = result[box]
    whole = found.repeat(x, 0).repeat(y, 1).repeat(z, 2)[: part.shape[0], : part.shape[1], : part.shape[2]]
    part &= ~whole
    return result


def box_around(mask: Bool[ndarray, "X Y Z"], margins: Sequence[int]) -> tuple[slice, ...]:
    """Return the box of a mask that is not empty, with margins in voxels."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(0, s.start - margin), s.stop + margin) for s, margin in zip(box, margins, strict=True))


def not_liver(
    mask: Bool[ndarray, "X Y Z"],
    smooth: Float32[ndarray, "X Y Z"],
    liver_hu: float,
    spacing_mm: tuple[float, float, float],
    tissue: Collection[str] = ("fat", "vessels"),
) -> Bool[ndarray, "X Y Z"]:
    """Return fat and vessels in and around a liver mask. `smooth` is smoothed HU, `liver_hu` the liver's HU."""
    found = np.zeros(mask.shape, np.bool_)
    if "fat" in tissue:
        found |= _fat(smooth, liver_hu, spacing_mm)
    if "vessels" in tissue:
        found |= _vessels(mask, smooth, liver_hu, spacing_mm)
    return found


def _fat(
    smooth: Float32[ndarray, "X Y Z"], liver_hu: float, spacing_mm: tuple[float, float, float]
) -> Bool[ndarray, "X Y Z"]:
    """Return larger pieces of fat, with the voxels around them that mix fat and other tissue."""
    low, high = FAT_HU
    labels, _ = ndimage.label((smooth > low) & (smooth < high), np.ones((3, 3, 3)))
    large = np.bincount(labels.ravel()) * np.prod(spacing_mm) / 1000 >= FAT_ML
    large[0] = False
    fat: ndarray = large[labels]
    near = ndimage.distance_transform_edt(~fat, sampling=spacing_mm) < MIXED_MM
    return fat | near & (smooth < high + MIXED_SHARE * (liver_hu - high)) if fat.any() else fat


def _vessels(
    mask: Bool[ndarray, "X Y Z"],
    smooth: Float32[ndarray, "X Y Z"],
    liver_hu: float,
    spacing_mm: tuple[float, float, float],
) -> Bool[ndarray, "X Y Z"]:
    """Return thick bright tissue that lies mostly outside the mask, such as the vena cava and the portal vein's trunk.

    A kidney or a rib that touches the mask is found too.
    """
    bright = smooth > liver_hu + BRIGHT_HU
    labels, count = ndimage.label(ndimage.distance_transform_edt(bright, sampling=spacing_mm) > VESSEL_MM)
    inside = ndimage.mean(mask, labels, np.arange(1, count + 1)) if count else np.empty(0)
    outside: ndarray = np.concatenate([[False], inside < MOST_INSIDE])[labels]
    if not outside.any():
        return outside
    near = ndimage.distance_transform_edt(~outside, sampling=spacing_mm) < VESSEL_MM + EDGE_MM
    result: ndarray = near & (smooth > liver_hu + EDGE_HU)
    return result
