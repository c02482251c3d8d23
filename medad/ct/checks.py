"""Checks that a scan is in HU and that a mask is on its liver. What cannot be is refused; what is unusual is said.

The bounds were measured on CTs of BTCV (4), 3D-IRCADb (1) and LiTS (1), with right masks and with wrong ones. The wrong
ones were flipped along each axis, or moved by 2, 4 and 6 cm. docs/explanation/research-log.md has the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from medad.base.errors import InputError
from medad.ct.io import Labels, Volume

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

TISSUE_HU = (-100.0, 300.0)
"""Range of HU in a liver. Below are air and fat, above are bone and metal."""
UNUSUAL_SHARE, IMPOSSIBLE_SHARE = 0.01, 0.02
"""Share of a mask's voxels outside `TISSUE_HU` from which it is unusual, and from which it is not on the liver. Right
masks have 0.0000 to 0.0023, one with metal 0.005. Of 72 wrong ones 66 have more than 0.02."""

LIVER_ML = (300.0, 6000.0)
"""Usual volume of a whole liver in mL, of children and with large tumours too."""
LEFT_MM = 10.0
"""Distance of a liver's centre from the body's centre to the left from which it is unusual. It is 58 to 79 mm to the
right in the measured scans."""

SHOWN_VALUES = 12
_MANY_ORGANS, _TOTALSEGMENTATOR_LIVER = 20, 5
"""Number of values from which a map is TotalSegmentator's, with 104 or 117 organs, and its value of liver."""
_SOME_ORGANS, _SOME_LAST, _SOME_LIVER = 8, 15, 6
"""Numbers of values of BTCV's and AMOS's maps, with 13 and 15 organs, and their value of liver."""


def require_liver(labels: Labels, liver_labels: Sequence[int], path: Path) -> Bool[np.ndarray, "X Y Z"]:
    """Return the liver ROI in canonical order: voxels with one of the values `liver_labels`.

    If none is given, the map must have one value besides 0, which must be 1.

    Raises
    ------
    InputError
        No voxel has such a value, or the value is not clear. The message lists the values of the label map.
    """
    if not liver_labels:
        _require_one_value(labels, path)
        liver_labels = (1,)
    liver = np.zeros_like(labels.values, dtype=np.bool_)
    for value in liver_labels:
        liver |= labels.values == value
    if not liver.any():
        present = np.unique(labels.values).tolist()
        shown = ", ".join(str(value) for value in present[:SHOWN_VALUES]) + (", ..." * (len(present) > SHOWN_VALUES))
        wanted = " or ".join(str(value) for value in liver_labels)
        raise InputError(path, f"label without liver: no voxel has value {wanted}; values present: {shown}")
    return liver


def _require_one_value(labels: Labels, path: Path) -> None:
    values, counts = np.unique(labels.values, return_counts=True)
    millilitres = {
        int(value): float(count) * labels.geometry.voxel_mm3 / 1000
        for value, count in zip(values, counts, strict=True)
        if value != 0
    }
    if not millilitres or set(millilitres) == {1}:
        return
    if len(millilitres) == 1:
        [value] = millilitres
        raise InputError(path, f"label without liver: its only value is {value}; if it is liver, --liver-label {value}")
    largest = sorted(millilitres, key=lambda value: -millilitres[value])
    shown = ", ".join(f"{value}: {millilitres[value]:.0f} mL" for value in largest[:SHOWN_VALUES])
    more = f" and {len(largest) - SHOWN_VALUES} more" * (len(largest) > SHOWN_VALUES)
    raise InputError(path, f"several values ({shown}{more}); say which is liver: {_offer(labels, millilitres)}")


def _offer(labels: Labels, millilitres: Mapping[int, float]) -> str:
    """Return the option that is probably right, and why."""
    count, last = len(millilitres), max(millilitres)
    if count >= _MANY_ORGANS and _TOTALSEGMENTATOR_LIVER in millilitres:
        return f"this looks like TotalSegmentator's map, --liver-label {_TOTALSEGMENTATOR_LIVER}"
    if count >= _SOME_ORGANS and last <= _SOME_LAST and _SOME_LIVER in millilitres:
        return f"this looks like the map of BTCV or AMOS, --liver-label {_SOME_LIVER}"
    largest = max(millilitres, key=lambda value: millilitres[value])
    inside = sorted(_inside(labels.values, labels.values == largest, {largest}))
    options = " ".join(f"--liver-label {value}" for value in sorted({largest, *inside}))
    lies = f"; {' and '.join(map(str, inside))} inside it" * bool(inside)
    return f"{options} is the largest{lies}"


def _inside(values: Integer[np.ndarray, "X Y Z"], liver: Bool[np.ndarray, "X Y Z"], known: set[int]) -> set[int]:
    """Return the values of which more than half of the surface touches liver."""
    box = ndimage.find_objects(liver.astype(np.uint8))[0]
    around = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in box)
    values, liver = values[around], liver[around]
    found = set()
    for value in set(np.unique(values).tolist()) - known - {0}:
        there = values == value
        touching = faces = 0
        for axis in range(3):
            first, second = (
                np.take(there, range(there.shape[axis] - 1), axis),
                np.take(there, range(1, there.shape[axis]), axis),
            )
            edge = first != second
            liver_first = np.take(liver, range(liver.shape[axis] - 1), axis)
            liver_second = np.take(liver, range(1, liver.shape[axis]), axis)
            faces += int(edge.sum())
            touching += int((edge & (liver_first | liver_second)).sum())
        if faces and touching > 0.5 * faces:
            found.add(int(value))
    return found


def left_out_values(labels: Labels, liver: Bool[np.ndarray, "X Y Z"], liver_labels: Sequence[int]) -> list[str]:
    """Return a warning if values inside the liver, such as tumours, are not taken as liver."""
    given = tuple(liver_labels) or (1,)
    inside = sorted(_inside(labels.values, liver, set(given)))
    if not inside:
        return []
    amounts = [float(np.count_nonzero(labels.values == value)) * labels.geometry.voxel_mm3 / 1000 for value in inside]
    shown = ", ".join(f"{value}: {ml:.1f} mL" for value, ml in zip(inside, amounts, strict=True))
    options = " ".join(f"--liver-label {value}" for value in sorted({*given, *inside}))
    return [f"the mask has values inside the liver that are not liver ({shown}); {options} takes them in"]


def fill_cavities(liver: Bool[np.ndarray, "X Y Z"], voxel_mm3: float) -> tuple[Bool[np.ndarray, "X Y Z"], list[str]]:
    """Return the mask with its closed cavities filled, and a warning if there are any. A tumour may be left out so."""
    box = ndimage.find_objects(liver.astype(np.uint8))[0]
    filled = liver.copy()
    filled[box] = ndimage.binary_fill_holes(liver[box])
    added = float(np.count_nonzero(filled) - np.count_nonzero(liver)) * voxel_mm3 / 1000
    return filled, [f"cavities of the liver mask were filled: {added:.1f} mL"] if added else []


def check_hu(volume: Volume, liver: Bool[np.ndarray, "X Y Z"], path: Path) -> float:
    """Check by the liver that a scan's values are plausible Hounsfield units. Return the liver's median HU.

    Raises
    ------
    InputError
        The rescale slope or intercept is wrong, or the scan is not a CT. The message shows the values found.
    """
    hu = volume.hu
    if min(hu.shape[:2]) < MIN_SIDE:
        raise InputError(
            path, f"too small: {' x '.join(map(str, hu.shape))} voxels, expected at least {MIN_SIDE} a side"
        )
    low, high = float(hu.min()), float(hu.max())
    if low < HU_RANGE[0] or high > HU_RANGE[1] or high - low < SCAN_RANGE_HU:
        raise InputError(
            path, f"not plausible HU (wrong rescale slope, or not a CT?): values are from {low:.4g} to {high:.4g}"
        )
    # the file's order is the memory's order, which is several times faster
    ordered = volume.geometry.to_source(hu).T
    inside = ordered[volume.geometry.to_source(liver).T]
    tenth, median, ninetieth = (float(value) for value in np.percentile(inside, [10, 50, 90]))
    if not LIVER_MEDIAN_HU[0] <= median <= LIVER_MEDIAN_HU[1]:
        offset = "; values look like HU + 1024" * (LIVER_MEDIAN_HU[0] <= median - 1024 <= LIVER_MEDIAN_HU[1])
        raise InputError(
            path,
            f"not plausible HU (wrong rescale slope?): the liver's median is {median:.4g}, expected "
            f"{LIVER_MEDIAN_HU[0]:g} to {LIVER_MEDIAN_HU[1]:g}{offset}",
        )
    if ninetieth - tenth < LIVER_SPREAD_HU:
        raise InputError(
            path,
            f"not plausible HU (wrong rescale slope?): 80 % of the liver's values lie within "
            f"{ninetieth - tenth:.3g} HU, expected at least {LIVER_SPREAD_HU:g}",
        )
    fat = float(np.count_nonzero(ordered < FAT_HU)) / hu.size
    if fat < MIN_FAT_SHARE:
        raise InputError(
            path,
            f"not HU: {100 * fat:.2g} % of the voxels are below {FAT_HU:g} HU, but a CT has fat and air; values are "
            f"from {low:.4g} to {high:.4g}",
        )
    return median


def check_mask(volume: Volume, liver: Bool[np.ndarray, "X Y Z"], path: Path) -> list[str]:
    """Check that a mask is on the liver. Return warnings about what is unusual.

    Raises
    ------
    InputError
        Too much of the mask is air, fat, bone or metal.
    """
    hu, geometry = volume.hu, volume.geometry
    inside = geometry.to_source(hu).T[geometry.to_source(liver).T]
    outside = float(np.count_nonzero((inside < TISSUE_HU[0]) | (inside > TISSUE_HU[1]))) / inside.size
    what = f"{100 * outside:.1f} % of the mask is air, fat or bone (outside {TISSUE_HU[0]:g} to {TISSUE_HU[1]:g} HU)"
    if outside > IMPOSSIBLE_SHARE:
        raise InputError(path, f"the mask is not on the liver: {what}; is it flipped, shifted, or of another scan?")
    warnings = [f"{what}; check the liver mask"] * (outside > UNUSUAL_SHARE)
    millilitres = inside.size * geometry.voxel_mm3 / 1000
    cut = bool(liver[:, :, 0].any() or liver[:, :, -1].any())
    low, high = LIVER_ML
    if millilitres > high or (millilitres < low and not cut):
        warnings.append(f"the liver mask has {millilitres:.0f} mL, a whole liver {low:.0f} to {high:.0f} mL; check it")
    elif cut:
        warnings.append(f"the liver is cut by the field of view ({millilitres:.0f} mL are inside)")
    body = hu > -300
    across = np.arange(hu.shape[0])
    centre = float(across @ liver.sum((1, 2))) / max(1, int(liver.sum()))
    middle = float(across @ body.sum((1, 2))) / max(1, int(body.sum()))
    left_mm = (centre - middle) * geometry.canonical_spacing_mm[0]
    if left_mm > LEFT_MM:
        warnings.append(
            f"the liver mask lies {left_mm:.0f} mm on the left side of the body: another organ, or sides are swapped?"
        )
    return warnings
