"""Connected components by definition, for tests of lesions, defects and foregrounds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np


def flood_fill(mask: np.ndarray[Any, Any]) -> list[set[tuple[int, ...]]]:
    """Return the components of a mask of any dimension. Neighbours touch at least at a corner."""
    left = {tuple(map(int, place)) for place in np.argwhere(mask)}
    steps = list(itertools.product((-1, 0, 1), repeat=mask.ndim))
    components = []
    while left:
        front, component = [left.pop()], set[tuple[int, ...]]()
        while front:
            place = front.pop()
            component.add(place)
            near = {tuple(a + b for a, b in zip(place, step, strict=True)) for step in steps} & left
            left -= near
            front += near
        components.append(component)
    return components
