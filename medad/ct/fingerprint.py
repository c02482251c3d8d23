"""What one scan's liver has in common however the scan is stored: to find it again under another file."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Bool, Float32

FINGERPRINT = "liver_sha256"
"""Its name in case.json and in a run's manifest."""


def liver_fingerprint(hu: Float32[np.ndarray, "X Y Z"], liver: Bool[np.ndarray, "X Y Z"]) -> str:
    """sha256, hexadecimal, of how often each whole HU occurs among the liver's voxels.

    Where the voxels lie plays no part, so that a scan that was compressed anew, converted, cropped around its liver,
    mirrored or given another header has the same fingerprint; two livers agree in all their thousands of counts by
    no chance. A scan that was resampled, filtered or clipped inside the liver, or whose liver was outlined anew, has
    another one.

    Parameters
    ----------
    hu
        Any order of axes; rounded to whole HU, as scanners store them.
    liver
        On the same grid; holds at least one voxel.
    """
    values, counts = np.unique(np.rint(hu[liver]).astype("<i8"), return_counts=True)
    return hashlib.sha256(values.tobytes() + counts.astype("<i8").tobytes()).hexdigest()
