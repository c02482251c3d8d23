"""Checks of a liver mask: values, volume, place and connection.

An automatic mask that breaks a rule is refused. A given one is refused if it is not on the liver at all, and otherwise
the broken rules are said. `benchmarks/liver_masks.py` measures the bounds, and docs/explanation/research-log.md has the
figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.base.boxes import axes_by_stride, bounding_box, memory_order
from medad.base.errors import InputError
from medad.ct.io import Volume
from medad.ct.scale import LIVER_MEDIAN_HU
from medad.organ.refine import largest_piece

WHOLE_ML = (400.0, 3500.0)
"""Plausible volume of a whole liver that was found automatically."""
GIVEN_WHOLE_ML = (300.0, 6000.0)
"""Usual volume of a whole liver that a person outlined, of children and with large tumours too."""
PART_ML = 20.0
"""Smallest volume of a part of a liver at an end of the scan."""
LEAST_SURENESS = 0.5
LEAST_PIECE = 0.7
"""Smallest share of the mask that must be one piece."""
CHECK_MM = 5.0
BODY_HU, AIR_HU = -300.0, -500.0
LUNG_ML = 300.0
"""Volume from which air in the right half of the chest counts as the right lung."""

TISSUE_HU = (-30.0, 250.0)
"""Range of means inside a liver. Below are fat, air and fluid beside it, above are bone and metal."""
BELOW_MEDIAN_HU, FAT_HU = 60.0, -90.0
"""In a fatty liver the range begins this much below the liver's median, but not below the HU of fat."""
UNUSUAL_SHARE, FOREIGN_SHARE = (0.004, 0.01), (0.01, 0.1)
"""Shares of the means below and above this range from which a mask is unusual, and from which it is not on the liver.

Right masks of six CTs have at most 0.002, also with noise of 60 HU, and one with metal has 0.016 above. Masks that were
moved by 2 cm or more mostly have over 0.02 below.
"""
SAMPLE_MM, BLOCK_MM = 1.5, 3.0
"""Distance of the voxels that are looked at, and side of the blocks whose means are taken."""


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
    whole_ml: tuple[float, float] = WHOLE_ML,
) -> Checked:
    """Check a liver mask of a CT in canonical LPS order. `sureness` is 0..1, `whole_ml` the range for a whole liver."""
    millilitres = float(np.count_nonzero(mask) * np.prod(spacing_mm) / 1000)
    problems = []
    whole = not (mask[:, :, 0].any() or mask[:, :, -1].any())
    low, high = whole_ml[0] if whole else PART_ML, whole_ml[1]
    if not low <= millilitres <= high:
        part = "a liver" if whole else "a part of a liver"
        problems.append(f"its volume is {millilitres:.0f} mL, expected {low:.0f} to {high:.0f} mL for {part}")
    if not mask.any():
        return Checked(tuple(problems), whole, millilitres)
    ordered, inside = memory_order(hu, mask)
    median = float(np.median(ordered[inside]))
    if not LIVER_MEDIAN_HU[0] <= median <= LIVER_MEDIAN_HU[1]:
        problems.append(
            f"its median is {median:.0f} HU, expected {LIVER_MEDIAN_HU[0]:.0f} to {LIVER_MEDIAN_HU[1]:.0f} HU"
        )
    every = tuple(max(1, round(CHECK_MM / step)) for step in spacing_mm)
    few = tuple(slice(None, None, number) for number in every)
    problems += _misplaced(hu[few], mask[few], float(np.prod(spacing_mm) * np.prod(every) / 1000))
    if sureness < LEAST_SURENESS:
        problems.append(f"the method is not sure of it ({sureness:.2f}, expected at least {LEAST_SURENESS})")
    return Checked(tuple(problems), whole, millilitres)


def check_given(volume: Volume, mask: Bool[ndarray, "X Y Z"], path: Path) -> list[str]:
    """Check the liver mask that a person gave for a scan. Return warnings about what is unusual.

    Raises
    ------
    InputError
        The mask is not on the liver: too much of its inside is air, fat, bone or metal.
    """
    spacing_mm = volume.geometry.canonical_spacing_mm
    means = _inner_means(volume.hu, mask, spacing_mm)
    low = min(TISSUE_HU[0], max(float(np.median(means)) - BELOW_MEDIAN_HU, FAT_HU))
    shares = float(np.mean(means < low)), float(np.mean(means > TISSUE_HU[1]))
    expected = f"means outside {low:.0f} to {TISSUE_HU[1]:.0f} HU"
    what = f"{100 * sum(shares):.1f} % of its inside is air, fat or bone ({expected})"
    if _exceeds(shares, FOREIGN_SHARE):
        raise InputError(path, f"the mask is not on the liver: {what}; is it flipped, shifted, or of another scan?")
    checked = check(volume.hu, mask, spacing_mm, whole_ml=GIVEN_WHOLE_ML)
    problems = [*[what] * _exceeds(shares, UNUSUAL_SHARE), *checked.problems]
    warnings = [f"the given liver mask looks unusual: {'; '.join(problems)}"] * bool(problems)
    if not checked.whole:
        warnings.append(f"the liver is cut by the field of view ({checked.millilitres:.0f} mL are inside)")
    return warnings


def _exceeds(shares: tuple[float, float], most: tuple[float, float]) -> bool:
    return shares[0] > most[0] or shares[1] > most[1]


def _inner_means(
    hu: Float32[ndarray, "X Y Z"], mask: Bool[ndarray, "X Y Z"], spacing_mm: tuple[float, float, float]
) -> Float32[ndarray, " n"]:
    """Return means over blocks of about 9 mm inside the mask, without its outer 3 mm if it is thick enough.

    Noise and rough borders hardly change them. Planes that are more than 4 mm thick are not averaged.
    """
    sizes_mm = [spacing_mm[axis] for axis in axes_by_stride(hu)]
    hu, mask = memory_order(hu, mask)
    box = bounding_box(mask)
    assert box is not None, "the mask is not empty"
    every = [max(1, int(SAMPLE_MM / step)) for step in sizes_mm]
    few = tuple(slice(part.start, part.stop, number) for part, number in zip(box, every, strict=True))
    values, inside = (np.ascontiguousarray(part[few]) for part in (hu, mask))
    steps = [step * number for step, number in zip(sizes_mm, every, strict=True)]
    sides = [max(1, min(round(BLOCK_MM / step), n)) for step, n in zip(steps, values.shape, strict=True)]
    full = _block_means(inside, sides) == 1
    if not full.any():
        seen: ndarray = values[inside] if inside.any() else hu[mask]
        return seen
    is_thin = [step * side <= 4 for step, side in zip(steps, sides, strict=True)]
    neighbours = ndimage.generate_binary_structure(3, 1)
    for axis in (axis for axis in range(3) if not is_thin[axis]):
        neighbours &= np.indices((3, 3, 3))[axis] == 1
    inner = ndimage.binary_erosion(full, neighbours)
    inner = inner if inner.any() else full
    size = [3 if thin else 1 for thin in is_thin]
    total = ndimage.uniform_filter(np.where(inner, _block_means(values, sides), 0), size, mode="constant")
    found: ndarray = total[inner] / ndimage.uniform_filter(inner.astype(np.float32), size, mode="constant")[inner]
    return found


def _block_means(values: ndarray, sides: list[int]) -> Float32[ndarray, "A B C"]:
    """Return means over blocks with these sides. Voxels at the end that fill no block are left out."""
    for axis, side in enumerate(sides):
        whole = values.shape[axis] // side
        values = values[(slice(None),) * axis + (slice(whole * side),)]
        values = values.reshape(*values.shape[:axis], whole, side, *values.shape[axis + 1 :])
        values = values.mean(axis + 1, dtype=np.float32)
    return values


def _misplaced(hu: Float32[ndarray, "A B C"], mask: Bool[ndarray, "A B C"], voxel_ml: float) -> list[str]:
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
    lung = _right_lung(hu, body, middle_x, voxel_ml)
    if lung is not None and centre_z > ndimage.center_of_mass(lung)[2]:
        problems.append("its centre is above the centre of the right lung")
    return problems


def _right_lung(
    hu: Float32[ndarray, "A B C"], body: Bool[ndarray, "A B C"], middle_x: float, voxel_ml: float
) -> Bool[ndarray, "A B C"] | None:
    """Return the air inside the right half of the body if it is large enough to be a lung."""
    inside = np.zeros_like(body)
    for z in range(body.shape[2]):
        inside[:, :, z] = ndimage.binary_fill_holes(body[:, :, z])
    air = inside & (hu < AIR_HU) & (hu > -980)
    air[int(middle_x) :] = False
    lung = largest_piece(ndimage.binary_opening(air))
    return lung if np.count_nonzero(lung) * voxel_ml >= LUNG_ML else None
