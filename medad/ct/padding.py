"""Voxels outside the scanned body that contain no measurement: NaN, infinite, or a value that no CT can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from medad.base.errors import InputError

AIR_HU = -1024.0
"""Value of air in CT, as most scanners store it outside the body."""
STORED_HU = (-4096.0, 30710.0)
"""Range of values that scanners write as HU. The usual padding of -3024 is in it, because it is as dark as air in any
window. The upper end is that of the extended scale, for metal."""
MEASURED_HU = (-32768.0, 32767.0)
"""Range of values that can be a measurement inside the body, although no scanner writes them as HU."""
_BODY_HU = -300.0
_SMALLEST_PART = 0.01
_LARGEST_SHARE = 0.5


def is_stored(low: float, high: float) -> bool:
    """Return whether values from `low` to `high` are finite and in the range that scanners write."""
    return bool(low >= STORED_HU[0] and high <= STORED_HU[1])  # false for NaN


def is_odd(hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which finite values lie outside of the range that scanners write."""
    found: NDArray[np.bool_] = (hu < STORED_HU[0]) | (hu > STORED_HU[1])
    return found


def is_padded(missing: int, odd: int, voxels: int, path: Path) -> bool:
    """Return whether a scan with these numbers of unusual voxels has padding.

    If most values are odd, the scale is wrong, which `check_hu` reports. Raises InputError if most are missing.
    """
    if missing > _LARGEST_SHARE * voxels:
        raise InputError(path, f"{missing} of {voxels} voxels are NaN or infinite")
    return missing + odd > 0 and odd <= _LARGEST_SHARE * voxels


def clear_padding(hu: Float32[np.ndarray, "X Y Z"], path: Path) -> tuple[Bool[np.ndarray, "X Y Z"], list[str]]:
    """Set voxels without a measurement to air, in place, if they lie outside the body.

    The body is all large connected regions above -300 HU, with their holes in each slice, and what lies between two
    of their slices. Finite values inside the body stay as they are.

    Parameters
    ----------
    hu
        Scan in canonical order.

    Returns
    -------
    The voxels that were set, and notes that count them.

    Raises
    ------
    InputError
        Such voxels lie inside the body.
    """
    missing = ~np.isfinite(hu)
    odd = ~missing & is_odd(hu)
    count = int(np.count_nonzero(missing))
    body = _body(hu, missing | odd)
    inside = int(np.count_nonzero(missing & body))
    if inside:
        raise InputError(path, f"voxels inside the body are NaN or infinite ({inside} of {count})")
    measured = (hu >= MEASURED_HU[0]) & (hu <= MEASURED_HU[1])
    inside = int(np.count_nonzero(odd & body & ~measured))
    if inside:
        rule = f"values are from {hu[odd].min():.5g} to {hu[odd].max():.5g}"
        raise InputError(path, f"not plausible HU: {rule} in {inside} voxels inside the body; is this padding?")
    odd &= ~body
    notes = []
    if count:
        notes.append(f"voxels outside the body that are NaN or infinite count as air: {count}")
    if padded := int(np.count_nonzero(odd)):
        low, high = float(hu[odd].min()), float(hu[odd].max())
        values = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        notes.append(f"padding outside the body (value {values}) counts as air: {padded} voxels")
    cleared = missing | odd
    hu[cleared] = AIR_HU
    return cleared, notes


def check_padding(cleared: Bool[np.ndarray, "X Y Z"] | None, liver: Bool[np.ndarray, "X Y Z"], path: Path) -> None:
    """Check that no voxel of the liver was padding. Raises InputError."""
    if cleared is not None and (count := int(np.count_nonzero(cleared & liver))):
        raise InputError(path, f"voxels of the liver mask are NaN, infinite or padding ({count} found)")


def _body(hu: Float32[np.ndarray, "X Y Z"], unknown: Bool[np.ndarray, "X Y Z"]) -> Bool[np.ndarray, "X Y Z"]:
    """Return the body with its holes, and the unknown voxels between two of its slices."""
    from scipy import ndimage  # only such scans need it, and it is slow to load

    body = hu > _BODY_HU
    body &= ~unknown
    labelled, count = ndimage.label(body)
    planes = range(hu.shape[2])
    sizes = np.sum([np.bincount(labelled[:, :, z].ravel(), minlength=count + 1) for z in planes], axis=0)
    sizes[0] = 0
    large = sizes >= max(_SMALLEST_PART * sizes.max(), 1)  # several parts, because a missing plane cuts the body in two
    for z in planes:
        body[:, :, z] = large[labelled[:, :, z]]
    del labelled
    below = np.logical_or.accumulate(body, axis=2)
    above = np.logical_or.accumulate(body[:, :, ::-1], axis=2)[:, :, ::-1]
    body |= below & above & unknown
    for z in planes:
        outside, parts = ndimage.label(~body[:, :, z])
        hole = np.ones(parts + 1, dtype=np.bool_)
        for edge in (outside[0], outside[-1], outside[:, 0], outside[:, -1]):
            hole[edge] = False  # it reaches the border
        body[:, :, z] |= hole[outside]
    return body
