"""Checks of a liver mask: volume, HU, place and connection. They refuse a stomach or a spleen in one line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.ct.checks import LIVER_MEDIAN_HU
from medad.organ.coarse import coarse_shape, to_coarse
from medad.organ.refine import largest_piece

WHOLE_ML = (400.0, 3500.0)
"""Plausible volume of a whole liver."""
PART_ML = 20.0
"""Smallest volume of a part of a liver at an end of the scan."""
LEAST_SURENESS = 0.5
LEAST_PIECE = 0.7
"""Smallest share of the mask that must be one piece."""
CHECK_MM = 5.0
BODY_HU, AIR_HU = -300.0, -500.0
LUNG_ML = 300.0
"""Volume from which air in the right half of the chest counts as the right lung."""


@dataclass(frozen=True)
class Checked:
    """The result of the checks."""

    problems: tuple[str, ...]
    """Broken rules, each with the value found and the value expected."""
    whole: bool
    """Whether the liver ends within the scan. Otherwise the scan's first or last plane cuts it."""
    millilitres: float
    """Volume of the mask."""


def check(
    hu: Float32[ndarray, "X Y Z"],
    mask: Bool[ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    *,
    sureness: float = 1.0,
) -> Checked:
    """Check a liver mask of a CT in canonical LPS order. `sureness` is 0..1."""
    millilitres = float(np.count_nonzero(mask) * np.prod(spacing_mm) / 1000)
    problems = []
    whole = not (mask[:, :, 0].any() or mask[:, :, -1].any())
    low, high = WHOLE_ML[0] if whole else PART_ML, WHOLE_ML[1]
    if not low <= millilitres <= high:
        part = "a liver" if whole else "a part of a liver"
        problems.append(f"its volume is {millilitres:.0f} mL, expected {low:.0f} to {high:.0f} mL for {part}")
    if not mask.any():
        return Checked(tuple(problems), whole, millilitres)
    median = float(np.median(hu[mask]))
    if not LIVER_MEDIAN_HU[0] <= median <= LIVER_MEDIAN_HU[1]:
        problems.append(
            f"its median is {median:.0f} HU, expected {LIVER_MEDIAN_HU[0]:.0f} to {LIVER_MEDIAN_HU[1]:.0f} HU"
        )
    shape = coarse_shape(hu.shape, spacing_mm, CHECK_MM)
    problems += _misplaced(to_coarse(hu, shape), to_coarse(mask, shape) > 0.5)
    if sureness < LEAST_SURENESS:
        problems.append(f"the method is not sure of it ({sureness:.2f}, expected at least {LEAST_SURENESS})")
    return Checked(tuple(problems), whole, millilitres)


def _misplaced(hu: Float32[ndarray, "A B C"], mask: Bool[ndarray, "A B C"]) -> list[str]:
    """Return the rules of place that a mask breaks: one piece, on the patient's right, below the right lung."""
    if not mask.any():
        return []
    problems = []
    share = np.count_nonzero(largest_piece(mask)) / np.count_nonzero(mask)
    if share < LEAST_PIECE:
        problems.append(f"its largest piece is {share:.0%} of it, expected at least {LEAST_PIECE:.0%}")
    body = largest_piece(hu > BODY_HU)
    planes = np.flatnonzero(mask.any((0, 1)))
    centre_x, _, centre_z = ndimage.center_of_mass(mask)
    middle_x = float(np.mean(np.nonzero(body[:, :, planes[0] : planes[-1] + 1])[0])) if body.any() else centre_x
    if centre_x > middle_x:
        problems.append("its centre is on the patient's left")
    lung = _right_lung(hu, body, middle_x)
    if lung is not None and centre_z > ndimage.center_of_mass(lung)[2]:
        problems.append("its centre is above the centre of the right lung")
    return problems


def _right_lung(
    hu: Float32[ndarray, "A B C"], body: Bool[ndarray, "A B C"], middle_x: float
) -> Bool[ndarray, "A B C"] | None:
    """Return the air inside the right half of the body if it is large enough to be a lung."""
    inside = np.zeros_like(body)
    for z in range(body.shape[2]):
        inside[:, :, z] = ndimage.binary_fill_holes(body[:, :, z])
    air = inside & (hu < AIR_HU) & (hu > -980)
    air[int(middle_x) :] = False
    lung = largest_piece(ndimage.binary_opening(air))
    return lung if np.count_nonzero(lung) * CHECK_MM**3 / 1000 >= LUNG_ML else None
