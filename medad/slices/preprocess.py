"""Preprocessing of a CT volume to equalised liver slices.

It follows section 3.4.1 of the thesis (Zhang, University of Alberta, 2024).
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from scipy import ndimage

from medad.config.liver import PreprocessSettings
from medad.slices.grid import Slices, slice_grid, slice_volume

LIFT_FROM, LIFT_TO = (1, 149), (30, 150)
FILTER_RADIUS, PART_PLANES = 4.0, 64
"""Radius of a Gaussian filter in standard deviations, and number of planes that are smoothed at a time."""


def window(hu: Float32[ndarray, "X Y Z"], window_hu: tuple[float, float]) -> UInt8[ndarray, "X Y Z"]:
    """Map HU linearly so that `window_hu` becomes 0..255. Values are clipped and rounded to the nearest grey value."""
    low, high = window_hu
    grey = np.empty_like(hu, dtype=np.uint8)  # has the memory order of the scan
    scale = np.float32(255.0 / (high - low))
    for z in range(hu.shape[2]):
        plane = (hu[:, :, z] - np.float32(low)) * scale
        np.clip(plane, 0.0, 255.0, out=plane)
        grey[:, :, z] = np.rint(plane, out=plane)
    return grey


def liver_roi(
    grey: UInt8[ndarray, "X Y Z"], liver: Bool[ndarray, "X Y Z"], background: int = 0
) -> UInt8[ndarray, "X Y Z"]:
    """Set everything outside the liver to the background."""
    return np.where(liver, grey, np.uint8(background))


def equalise(
    pixels: UInt8[ndarray, "N S S"], organ: Bool[ndarray, "N S S"], lift_dark: bool
) -> UInt8[ndarray, "N S S"]:
    """Equalise each slice's histogram over its liver pixels. The background stays 0.

    Grey value g becomes round(255 * (cdf(g) - cdf_min) / (n - cdf_min)), where cdf counts liver pixels. A slice with
    only one grey value does not change. With `lift_dark`, results 0..149 move to 30..150. Dark liver then differs from
    the background, as in the method's public code, where only the background has value 0.
    """
    count = len(pixels)
    slot = (np.arange(count, dtype=np.int64) * 256)[:, None, None] + pixels
    histogram = np.bincount(slot[organ], minlength=256 * count).reshape(count, 256)
    cdf = histogram.cumsum(1)
    total = cdf[:, -1:]
    first = np.take_along_axis(cdf, (histogram > 0).argmax(1)[:, None], 1)
    span = total - first
    table = np.rint((cdf - first).clip(0) * 255 / np.maximum(span, 1))
    table = np.where(span > 0, table, np.arange(256.0))
    if lift_dark:
        table = np.where(table <= LIFT_FROM[1], _lift(table), table)
    return np.where(organ, table.astype(np.uint8).reshape(-1)[slot], np.uint8(0))


def _lift(grey: ndarray) -> ndarray:
    above = (np.maximum(grey, LIFT_FROM[0]) - LIFT_FROM[0]) * (LIFT_TO[1] - LIFT_TO[0])
    lifted: ndarray = np.rint(LIFT_TO[0] + above / (LIFT_FROM[1] - LIFT_FROM[0]))
    return lifted


def smooth_inside(
    hu: Float32[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    resolution_mm: float,
) -> Float32[ndarray, "X Y Z"]:
    """Smooth HU within the liver to a common resolution. Other voxels do not change.

    A voxel of size d averages over a box of variance d^2 / 12. Along each axis a Gaussian adds the variance that is
    missing to `resolution_mm` squared. The convolution is normalised: only liver voxels contribute.
    """
    sigma = [sqrt(max(resolution_mm**2 - size**2 / 12, 0)) / size for size in spacing_mm]
    if not any(sigma):
        return hu
    smooth = hu.copy()
    # parts of the planes need less memory; planes beyond the filter's radius change nothing
    radius = int(FILTER_RADIUS * sigma[2] + 0.5)
    for start in range(0, hu.shape[2], PART_PLANES):
        first, stop = max(0, start - radius), min(hu.shape[2], start + PART_PLANES)
        own = slice(start - first, stop - first)
        inside, part = liver[:, :, first : stop + radius], hu[:, :, first : stop + radius]
        weight, total = (
            ndimage.gaussian_filter(values, sigma, mode="constant", truncate=FILTER_RADIUS)[:, :, own]
            for values in (inside.astype(np.float32), np.where(inside, part, np.float32(0)))
        )
        mean = total / np.maximum(weight, np.float32(1e-6))
        np.copyto(smooth[:, :, start:stop], mean, where=liver[:, :, start:stop])
    return smooth


def prepare(
    hu: Float32[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    settings: PreprocessSettings,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Slices:
    """Prepare the slices of a scan.

    If requested, the scan is smoothed and standardised. The other steps have the thesis's order: window, liver ROI,
    slice and resize, equalise. Only planes with liver are processed, which gives the same result as the whole volume.

    Parameters
    ----------
    spacing_mm
        Voxel size, for `settings.resolution_mm` and `settings.frame_mm`.
    """
    grid = slice_grid(liver, spacing_mm, settings)
    zs = np.flatnonzero(liver.any((0, 1)))
    if len(zs) == 0:
        return slice_volume(np.zeros(hu.shape, np.uint8), liver, grid, settings.min_liver_px)
    low, high = int(zs[0]), int(zs[-1]) + 1
    slab = liver[:, :, low:high]
    x, y = (np.flatnonzero(slab.any(axes)) for axes in ((1, 2), (0, 2)))
    box = (slice(int(x[0]), int(x[-1]) + 1), slice(int(y[0]), int(y[-1]) + 1))
    inside, scan = slab[box], hu[*box, low:high]
    if settings.resolution_mm > 0:
        scan = smooth_inside(scan, inside, spacing_mm, settings.resolution_mm)
    window_hu = settings.window_hu
    if settings.standardise == "median":
        middle = float(np.median(hu[liver]))
        window_hu = (window_hu[0] + middle, window_hu[1] + middle)
    background = median_grey(settings) if settings.background == "median" else 0
    grey = np.full_like(slab, background, dtype=np.uint8)
    grey[box] = liver_roi(window(scan, window_hu), inside, background)
    del scan
    part = slice_volume(grey, slab, replace(grid, depth=high - low), settings.min_liver_px, background)
    pixels = equalise(part.pixels, part.organ, settings.lift_dark) if settings.equalise else part.pixels
    return Slices(pixels, part.organ, part.z + low, grid)


def median_grey(settings: PreprocessSettings) -> int:
    """Return the grey value of the liver's median HU with `standardise: median`."""
    low, high = settings.window_hu
    return int(np.clip(np.rint(-low * 255 / (high - low)), 0, 255))


def grey_per_hu(settings: PreprocessSettings) -> float | None:
    """Return the number of grey values per HU. None: after equalisation, grey values have no fixed scale."""
    low, high = settings.window_hu
    return None if settings.equalise else 255 / (high - low)
