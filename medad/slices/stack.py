"""Slices as a stack of consecutive planes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Shaped
from numpy import ndarray


def fill_planes(values: Shaped[ndarray, "N S S"], z: Int[ndarray, " N"]) -> Shaped[ndarray, "P S S"]:
    """Return the planes from the first to the last slice. A plane without a prepared slice is zero.

    Parameters
    ----------
    values
        One plane per prepared slice.
    z
        Plane numbers of the slices in the scan, ascending.
    """
    place = z - z[0]
    stack = np.zeros((int(place[-1]) + 1, *values.shape[1:]), values.dtype)
    stack[place] = values
    return stack
