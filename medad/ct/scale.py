"""Checks that a scan's values are Hounsfield units. What cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool

from medad.base.boxes import memory_order
from medad.base.errors import InputError
from medad.ct.io import Volume

LIVER_MEDIAN_HU = (-50.0, 250.0)
"""Plausible range of the liver's median. Fatty liver can be below 0 HU, and liver in the portal venous phase reaches
150 HU. Outside this range the scale is wrong."""

LIVER_SPREAD_HU = 2.0
"""Smallest plausible spread of liver values. CT noise already causes 5 HU and more. A smaller spread means that values
are scaled down or constant."""

HU_RANGE = (-32768.0, 32767.0)
"""Range of values that a scanner can store. Metal and padding may reach its ends."""

SCAN_RANGE_HU = 200.0
"""Smallest plausible range of a scan's values. Even one slice of a body reaches from fat (-100) to enhanced tissue
(150)."""

MIN_SIDE = 16
"""Smallest number of pixels along a side of a slice. A smaller scan shows too little of a liver to check anything."""

FAT_HU, MIN_FAT_SHARE = -50.0, 1e-3
"""Smallest share of voxels below this value. Fat and air are in every CT, and an image of grey values has neither."""

SAMPLES = 200_000
"""Number of voxels of a liver from which its percentiles are taken. More change them by less than 1 HU."""


def check_hu(volume: Volume, liver: Bool[np.ndarray, "X Y Z"], path: Path) -> float:
    """Check by the liver that a scan's values are plausible Hounsfield units. Return the liver's median HU.

    Raises
    ------
    InputError
        The rescale slope or intercept is wrong, or the scan is not a CT. The message shows the values found.
    """
    hu, mask = memory_order(volume.hu, liver)
    if min(volume.hu.shape[:2]) < MIN_SIDE:
        raise InputError(
            path, f"too small: {' x '.join(map(str, volume.hu.shape))} voxels, expected at least {MIN_SIDE} a side"
        )
    low, high = float(hu.min()), float(hu.max())
    if low < HU_RANGE[0] or high > HU_RANGE[1] or high - low < SCAN_RANGE_HU:
        raise InputError(
            path, f"not plausible HU (wrong rescale slope, or not a CT?): values are from {low:.4g} to {high:.4g}"
        )
    inside = hu[mask]
    tenth, median, ninetieth = (
        float(value) for value in np.percentile(inside[:: 1 + inside.size // SAMPLES], [10, 50, 90])
    )
    if not LIVER_MEDIAN_HU[0] <= median <= LIVER_MEDIAN_HU[1]:
        offset = "; values look like HU + 1024" * (LIVER_MEDIAN_HU[0] <= median - 1024 <= LIVER_MEDIAN_HU[1])
        raise InputError(
            path,
            f"not plausible HU (wrong rescale slope, or a mask beside the liver?): the liver's median is {median:.4g}, "
            f"expected {LIVER_MEDIAN_HU[0]:g} to {LIVER_MEDIAN_HU[1]:g}{offset}",
        )
    if ninetieth - tenth < LIVER_SPREAD_HU:
        raise InputError(
            path,
            f"not plausible HU (wrong rescale slope?): 80 % of the liver's values lie within "
            f"{ninetieth - tenth:.3g} HU, expected at least {LIVER_SPREAD_HU:g}",
        )
    few = hu[:, ::2]
    fat = float(np.count_nonzero(few < FAT_HU)) / few.size
    if fat < MIN_FAT_SHARE:
        raise InputError(
            path,
            f"not HU: {100 * fat:.2g} % of the voxels are below {FAT_HU:g} HU, but a CT has fat and air; values are "
            f"from {low:.4g} to {high:.4g}",
        )
    return median
