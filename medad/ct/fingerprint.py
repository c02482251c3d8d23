"""A fingerprint of a scan's liver that does not depend on the file. It finds copies of a scan under other names."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Bool, Float32

FINGERPRINT = "liver_sha256"
"""Key of the fingerprint in case.json and in a run's manifest."""


def liver_fingerprint(hu: Float32[np.ndarray, "X Y Z"], liver: Bool[np.ndarray, "X Y Z"]) -> str:
    """Return the sha256 (hexadecimal) of the liver's histogram of whole HU.

    The fingerprint ignores the positions of the voxels. It stays the same if a scan is compressed again, converted,
    cropped around its liver, flipped or given another header. Two different livers practically never have the same
    thousands of counts. The fingerprint changes if the liver is resampled, filtered, clipped or outlined again.

    Parameters
    ----------
    hu
        HU in any order of axes. They are rounded to whole HU, as scanners store them.
    liver
        Mask on the same grid with at least one voxel.
    """
    values, counts = np.unique(np.rint(hu[liver]).astype("<i8"), return_counts=True)
    return hashlib.sha256(values.tobytes() + counts.astype("<i8").tobytes()).hexdigest()
