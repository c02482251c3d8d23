"""LEAF: numbers that several rooms compute with."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

_LOGIT_LIMIT = 12.0


def logit(probability: Float32[ndarray, "*S"]) -> Float32[ndarray, "*S"]:
    """Return log(p / (1 - p)), limited to -12..12."""
    with np.errstate(divide="ignore"):
        values = np.log(probability) - np.log1p(-probability)
    return np.asarray(np.clip(values, -_LOGIT_LIMIT, _LOGIT_LIMIT), np.float32)
