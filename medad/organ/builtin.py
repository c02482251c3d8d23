"""The built-in way to find the liver: a small network on 4 mm, then a refinement by the liver's own HU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage
from torch import nn
from torch.nn import functional

from medad.organ.coarse import above_on_grid, coarse_shape, to_coarse
from medad.organ.exclusion import without
from medad.organ.network import BODY_HU, load_net, probability_of
from medad.organ.refine import REFINE_MM, dice, largest_piece, refine

COARSE_MM = 4.0
SHIFTS_HU = (-15.0, 0.0, 20.0)
"""Shifts of the body's HU. The network's logits are averaged over them."""
USUAL_HU = 110.0
"""HU of a liver in the portal venous phase. The HU of a scan with a brighter liver are scaled to it."""
OUTSIDE_LOGIT = -7.0
LONGEST_PLANES = 60
"""Number of coarse planes from which a scan is searched twice: as a whole, and around the liver that was found."""
AROUND_PLANES = 12
NOTHING = "no liver was found in this scan"


@dataclass(frozen=True, eq=False)
class Found:
    """A liver found by the built-in method, on the scan's grid."""

    mask: Bool[ndarray, "X Y Z"]
    sureness: float
    """The lower of two agreements (Dice, 0..1): of two thresholds, and of the network with itself after HU shifts."""


def find(hu: Float32[ndarray, "X Y Z"], spacing_mm: tuple[float, float, float]) -> Found | None:
    """Find the liver in a CT of the trunk or a part of it, in canonical LPS order. None if there is none."""
    shape = hu.shape
    coarse = to_coarse(hu, coarse_shape(shape, spacing_mm, COARSE_MM))
    maps = _logits(load_net(), coarse)
    if maps is None:
        return None
    logit: ndarray = maps.mean(0, dtype=np.float32)
    found: ndarray = logit > 0
    agreement = float(np.mean([dice(each > 0, found) for each in maps]))
    # only the part of the scan around the liver is refined
    x, y, z = shape
    wanted = coarse_shape(shape, spacing_mm, REFINE_MM)
    fine_shape = min(x, wanted[0]), min(y, wanted[1]), min(z, wanted[2])
    fine_mm = tuple(n * step / m for n, step, m in zip(shape, spacing_mm, fine_shape, strict=True))
    refined = refine(to_coarse(hu, fine_shape), _resized(logit, fine_shape), (fine_mm[0], fine_mm[1], fine_mm[2]))
    if refined is None:
        return None
    # the scan's own grid shows thin fat that the grid of the refinement does not
    mask = without(("fat", "vessels"), hu, above_on_grid(refined.field, (x, y, z)), spacing_mm)
    if not mask.any():
        return None
    return Found(mask, min(refined.sureness, agreement))


def _logits(net: nn.Module, hu: Float32[ndarray, "A B C"]) -> Float32[ndarray, "n A B C"] | None:
    """Return the network's logits for each shift of the HU. None if no voxel is liver or no body is visible."""
    box = _body_box(hu)
    if box is None:
        return None
    first = _logit(net, hu[box])
    if not (first > 0).any():
        return None
    filled = np.flatnonzero(largest_piece(first > 0).any((0, 1)))
    planes = slice(0, hu.shape[2])
    if hu.shape[2] > LONGEST_PLANES:
        planes = slice(max(0, int(filled[0]) - AROUND_PLANES), int(filled[-1]) + AROUND_PLANES + 1)
    box = box[0], box[1], planes
    bright = float(np.median(hu[box][first[:, :, planes] > 0]))
    part = np.where(hu[box] > 0, hu[box] * np.float32(min(1.0, USUAL_HU / max(bright, 1.0))), hu[box])
    body = part > -200
    maps = np.full((len(SHIFTS_HU), *hu.shape), OUTSIDE_LOGIT, np.float32)
    for number, shift in enumerate(SHIFTS_HU):
        maps[(number, *box)] = _logit(net, part + np.float32(shift) * body)
    return maps if (maps.mean(0) > 0).any() else None


def _logit(net: nn.Module, hu: Float32[ndarray, "A B C"]) -> Float32[ndarray, "A B C"]:
    probability = np.clip(probability_of(net, hu), 1e-3, 1 - 1e-3)
    result: ndarray = np.log(probability / (1 - probability))
    return result


def _body_box(hu: Float32[ndarray, "A B C"]) -> tuple[slice, slice, slice] | None:
    """Return the box of the body across the scan, with a margin of two voxels, over all planes."""
    opened = ndimage.binary_opening(hu > BODY_HU, iterations=2) if min(hu.shape) > 4 else hu > BODY_HU
    body = largest_piece(opened)
    if not body.any():
        return None
    x, y, _ = ndimage.find_objects(body.astype(np.uint8))[0]
    return slice(max(0, x.start - 2), x.stop + 2), slice(max(0, y.start - 2), y.stop + 2), slice(0, hu.shape[2])


def _resized(values: Float32[ndarray, "A B C"], shape: tuple[int, int, int]) -> Float32[ndarray, "X Y Z"]:
    volume = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    result: ndarray = functional.interpolate(volume, size=shape, mode="trilinear", align_corners=False)[0, 0].numpy()
    return result
