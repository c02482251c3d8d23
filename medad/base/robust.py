"""LEAF: a standard deviation that a few outliers do not change."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

MAD_TO_SD = 1.4826
"""Factor from the median absolute deviation (MAD) to the standard deviation of a normal distribution.

It is 1 / Phi^-1(3/4), rounded to four decimals (Rousseeuw and Croux, J. Am. Stat. Assoc. 88, 1993, section 1).
"""


def robust_sd(values: Float[ndarray, "*S"], centre: float | None = None) -> float:
    """Return 1.4826 times the median absolute deviation from `centre`, in the unit of the values.

    Parameters
    ----------
    values
        At least one value.
    centre
        Centre of the deviations. None: the median of the values.
    """
    middle = np.median(values) if centre is None else centre
    return float(np.median(np.abs(values - middle))) * MAD_TO_SD
