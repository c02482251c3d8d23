"""Foreground of an image by the first principal component of its patches (AnomalyDINO, section 3.3)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import ndimage
from torch import Tensor

BORDER = 0.2
"""Share of the image's side that is border on each side; the rest is the centre."""
SMALLEST_CENTRE = 0.35
"""Share of the centre's patches that must be foreground. Otherwise the component's sign is changed."""
_AROUND = np.ones((3, 3), dtype=bool)


def foreground(patches: Float[Tensor, "N W"], threshold: float) -> Bool[ndarray, "g g"]:
    """Return which patches of a crop are foreground.

    A patch is foreground if its first principal component is above `threshold`. If at most 35 % of the centre's
    patches are, the component's sign is changed. Then the mask is dilated and closed by squares of 3 x 3 patches. The
    sign of a principal component is arbitrary. Here it is the sign for which the centre has the larger mean.

    Parameters
    ----------
    patches
        Patches row by row, on any device.
    threshold
        Smallest value of the component, at the scale of the patches.
    """
    grid = round(len(patches) ** 0.5)
    values = patches.detach().cpu().double()
    centred = values - values.mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False)[2][0]
    component = (centred @ direction).reshape(grid, grid).numpy()
    inside = slice(int(grid * BORDER), int(grid * (1 - BORDER)))
    if component[inside, inside].size and component[inside, inside].mean() < component.mean():
        component = -component
    mask = component > threshold
    centre = mask[inside, inside]
    if centre.sum() <= centre.size * SMALLEST_CENTRE:
        mask = -component > threshold
    mask = ndimage.binary_dilation(mask, _AROUND)
    closed: ndarray = ndimage.binary_erosion(ndimage.binary_dilation(mask, _AROUND), _AROUND, border_value=1)
    return closed
