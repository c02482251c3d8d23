"""Refinement of the network's map by the HU of this liver, on a grid of 2.5 mm.

The network sees 4 mm and few shapes. The liver's own HU say where its border is: the likelihood ratio of the HU inside
and around it is added to the network's logit. Mean-field iterations of an Ising model then smooth the map
(Koller and Friedman, Probabilistic Graphical Models, section 11.5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.base.robust import robust_sd
from medad.organ.exclusion import box_around, not_liver

REFINE_MM = 2.5
SMOOTH_MM = 1.0
SOFT_TISSUE_HU = (-40.0, 260.0)
"""Smoothed HU outside this range are fat, gas, bone or metal."""
NETWORK_WEIGHT, HU_WEIGHT, COUPLING = 0.6, 1.0, 2.0
"""Weights of the network's logit, of the HU and of the neighbours. They were chosen on six labelled scans."""
COUPLING_MM, ITERATIONS = 3.0, 5
RATIO_RANGE = (-2.0, 2.5)
"""Range of the logarithm of the likelihood ratio. HU alone must not remove a dark tumour inside the liver."""
LEAST_LOGIT, NEVER_LOGIT, REGROWTH_MM = -2.0, -6.0, 10.0
"""Smallest logit that counts, logit below which nothing is liver, and distance that the liver may grow."""
BIN_HU, HISTOGRAM_HU, SPREAD_RANGE_HU = 4.0, (-152.0, 304.0), (6.0, 20.0)
RING_MM, MARGIN_MM = 20.0, 15.0
"""Width of the ring whose HU describe the surroundings, and margin of the box that is refined."""
NECK_MM, PIECE_SHARE, SURE_SHARE = 4.0, 0.05, 0.6
"""Radius up to which a bridge is cut. Size, of the largest piece, and share of liver by the network, from which another
piece is kept."""
CLOSING_MM, CLOSING_LOGIT = 8.0, -1.0
"""Radius of the closing that keeps tumours at the border, and smallest logit in it."""
RIM_HU, RIM_LOGIT = 45.0, -3.0
"""Range below the liver's HU, and smallest logit, of the rim that smoothing had removed."""
DOME_MM, DOME_LOGIT, DIAPHRAGM_PLANES = 30.0, -3.0, 3
"""Largest height and smallest logit of a dome between liver and lung, and planes that the diaphragm may take."""
LEAST_LEVEL = 0.6
"""Smallest distance of the level from 0, so that the border lies half-way between two voxels."""
LUNG_HU, BODY_HU = -400.0, -300.0


@dataclass(frozen=True, eq=False)
class Refined:
    """A refined liver on the fine grid."""

    field: Float32[ndarray, "X Y Z"]
    """Level: above 0 inside the liver. It crosses 0 between voxels, so that a finer grid gets a smooth border."""
    liver_hu: float
    """Most frequent smoothed HU of the liver."""
    sureness: float
    """Dice between the masks at P = 0.25 and P = 0.75, 0..1."""


def refine(
    hu: Float32[ndarray, "X Y Z"], logit: Float32[ndarray, "X Y Z"], spacing_mm: tuple[float, float, float]
) -> Refined | None:
    """Refine the network's `logit` on the grid of `hu`. None if the network finds no liver."""
    if not (logit > 0).any():
        return None
    box = box_around(logit > -1.5, [int(np.ceil(MARGIN_MM / step)) for step in spacing_mm])
    part = logit[box]
    smooth = ndimage.gaussian_filter(np.clip(hu[box], -150, 300), [SMOOTH_MM / step for step in spacing_mm])
    ratio, liver_hu = _log_ratio(smooth, part, spacing_mm)
    evidence = NETWORK_WEIGHT * np.maximum(part, LEAST_LOGIT) + HU_WEIGHT * ratio
    reach = ndimage.distance_transform_edt(part < -1, sampling=spacing_mm) > REGROWTH_MM
    evidence[reach | (part < NEVER_LOGIT)] = -8.0
    hard = (smooth < SOFT_TISSUE_HU[0]) | (smooth > SOFT_TISSUE_HU[1])
    evidence[hard] = -8.0
    probability = _mean_field(evidence, spacing_mm)
    mask = _cleaned(probability > 0.5, part, spacing_mm)
    if not mask.any():
        return None
    mask |= _closing(mask, spacing_mm) & (part > CLOSING_LOGIT) & ~hard
    mask |= ndimage.binary_dilation(mask) & (hu[box] > liver_hu - RIM_HU) & (part > RIM_LOGIT)
    dome = _below_lung(mask, hu[box], (part > DOME_LOGIT) & ~hard, spacing_mm[2])
    mask = _filled(mask | dome & _right_half(hu)[box[0], None, None])
    mask &= ~not_liver(mask, smooth, liver_hu, spacing_mm)
    lower, upper = ((probability > level) for level in (0.25, 0.75))
    near = ndimage.binary_dilation(mask, iterations=2)
    sureness = dice(lower & near | mask & lower, upper & mask)
    field = np.full(hu.shape, -1.0, np.float32)
    field[box] = _level(mask, probability)
    return Refined(field, liver_hu, sureness)


def dice(first: Bool[ndarray, "X Y Z"], second: Bool[ndarray, "X Y Z"]) -> float:
    """Return the Dice coefficient of two masks, 0..1. It is 0 if both are empty."""
    total = int(np.count_nonzero(first)) + int(np.count_nonzero(second))
    return 2 * int(np.count_nonzero(first & second)) / total if total else 0.0


def largest_piece(mask: Bool[ndarray, "X Y Z"]) -> Bool[ndarray, "X Y Z"]:
    """Return the largest connected piece of a mask, by faces."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    piece: ndarray = labels == sizes.argmax()
    return piece


def _log_ratio(
    smooth: Float32[ndarray, "X Y Z"], logit: Float32[ndarray, "X Y Z"], spacing_mm: tuple[float, ...]
) -> tuple[Float32[ndarray, "X Y Z"], float]:
    """Return log(P(HU | liver) / P(HU | around it)) for each voxel, and the mode of the liver's HU."""
    edges = np.arange(HISTOGRAM_HU[0], HISTOGRAM_HU[1] + BIN_HU, BIN_HU)
    centres = edges[:-1] + BIN_HU / 2
    inside = (logit > 1) & (smooth > -30)
    if np.count_nonzero(inside) < 300:
        inside = (logit > 0) & (smooth > -30)
    core = ndimage.binary_erosion(inside, iterations=max(1, int(CLOSING_MM / 2 / min(spacing_mm))))
    values = smooth[core if np.count_nonzero(core) >= 300 else inside]
    liver = ndimage.gaussian_filter1d(np.histogram(values, edges)[0].astype(float), 1.5) + 1e-9
    mode = float(centres[liver.argmax()])
    near = values[np.abs(values - mode) < 35]
    spread = robust_sd(near, mode) if near.size else SPREAD_RANGE_HU[1]
    spread = float(np.clip(spread, *SPREAD_RANGE_HU))
    distance = ndimage.distance_transform_edt(logit < 0, sampling=spacing_mm)
    around = np.histogram(smooth[(logit < -1) & (distance < RING_MM)], edges)[0].astype(float)
    around = ndimage.gaussian_filter1d(around / max(around.sum(), 1), 1.5) + 1e-3
    normal = np.exp(-0.5 * ((centres - mode) / spread) ** 2) * BIN_HU / (spread * np.sqrt(2 * np.pi))
    mixed = 0.85 * normal + 0.15 * liver / liver.sum() + 2e-4
    table = np.clip(np.log(mixed / around), *RATIO_RANGE).astype(np.float32)
    index = np.clip(((smooth - edges[0]) / BIN_HU).astype(int), 0, len(table) - 1)
    return table[index], mode


def _mean_field(evidence: Float32[ndarray, "X Y Z"], spacing_mm: tuple[float, ...]) -> Float32[ndarray, "X Y Z"]:
    sigma = [COUPLING_MM / step for step in spacing_mm]
    probability = _logistic(evidence)
    for _ in range(ITERATIONS):
        mean = ndimage.gaussian_filter(probability, sigma, truncate=2.5)
        probability = _logistic(evidence + np.float32(COUPLING) * (2 * mean - 1))
    return probability


def _logistic(x: Float32[ndarray, "X Y Z"]) -> Float32[ndarray, "X Y Z"]:
    result: ndarray = 1 / (1 + np.exp(-x))
    return result.astype(np.float32)


def _cleaned(
    mask: Bool[ndarray, "X Y Z"], logit: Float32[ndarray, "X Y Z"], spacing_mm: tuple[float, ...]
) -> Bool[ndarray, "X Y Z"]:
    """Return the largest piece, and others of which the network is sure, such as a left lobe in a part of a scan.

    Parts that hang on a bridge thinner than twice `NECK_MM` count as pieces.
    """
    labels, count = ndimage.label(ndimage.distance_transform_edt(mask, sampling=spacing_mm) > NECK_MM)
    if count == 0:
        return largest_piece(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    sure = ndimage.mean(logit > 0, labels, np.arange(1, count + 1))
    kept = (sizes == sizes.max()) | ((sizes >= PIECE_SHARE * sizes.max()) & (sure >= SURE_SHARE))
    core = np.concatenate([[False], kept])[labels]
    result: ndarray = mask & (ndimage.distance_transform_edt(~core, sampling=spacing_mm) < 1.5 * NECK_MM)
    return result


def _closing(mask: Bool[ndarray, "X Y Z"], spacing_mm: tuple[float, ...]) -> Bool[ndarray, "X Y Z"]:
    pad = int(np.ceil(CLOSING_MM / min(spacing_mm))) + 1
    wide = np.pad(mask, pad)
    grown = ndimage.distance_transform_edt(~wide, sampling=spacing_mm) < CLOSING_MM
    closed = ndimage.distance_transform_edt(grown, sampling=spacing_mm) > CLOSING_MM
    result: ndarray = closed[pad:-pad, pad:-pad, pad:-pad]
    return result


def _right_half(hu: Float32[ndarray, "X Y Z"]) -> Bool[ndarray, " X"]:
    """Return which planes lie on the patient's right of the body's middle."""
    mass = np.count_nonzero(hu > BODY_HU, axis=(1, 2))
    index = np.arange(len(mass))
    middle = (mass * index).sum() / max(mass.sum(), 1)
    result: ndarray = index < middle
    return result


def _below_lung(
    mask: Bool[ndarray, "X Y Z"], hu: Float32[ndarray, "X Y Z"], soft: Bool[ndarray, "X Y Z"], step_mm: float
) -> Bool[ndarray, "X Y Z"]:
    """Return soft voxels between the mask and lung above it, at most `DOME_MM` high.

    Only the diaphragm lies between liver and right lung. A dark tumour in the dome is therefore liver.
    """
    depth, most = mask.shape[2], int(DOME_MM / step_mm)
    reached, height = np.zeros_like(mask), np.zeros(mask.shape[:2], int)
    for z in range(1, depth):
        rises = (mask[:, :, z - 1] | reached[:, :, z - 1]) & ~mask[:, :, z] & soft[:, :, z]
        height = np.where(rises, height + 1, 0)
        reached[:, :, z] = rises & (height <= most)
    lung = hu < LUNG_HU
    below, dome = np.zeros(mask.shape[:2], bool), np.zeros_like(mask)
    for z in range(depth - 2, -1, -1):
        near = lung[:, :, z + 1 : z + 1 + DIAPHRAGM_PLANES].any(2)
        below = reached[:, :, z] & (near | below)
        dome[:, :, z] = below
    opened: ndarray = ndimage.binary_opening(dome)
    return opened


def _filled(mask: Bool[ndarray, "X Y Z"]) -> Bool[ndarray, "X Y Z"]:
    """Return a mask without holes, in 3D and in each axial plane."""
    filled = ndimage.binary_fill_holes(mask)
    for z in range(mask.shape[2]):
        filled[:, :, z] = ndimage.binary_fill_holes(filled[:, :, z])
    result: ndarray = filled
    return result


def _level(mask: Bool[ndarray, "X Y Z"], probability: Float32[ndarray, "X Y Z"]) -> Float32[ndarray, "X Y Z"]:
    """Return 2 P - 1, moved to the mask's side of 0 where the cleaning decided otherwise."""
    level = 2 * probability - 1
    inside = np.maximum(level, LEAST_LEVEL)
    result: ndarray = np.where(mask, inside, np.minimum(level, -LEAST_LEVEL)).astype(np.float32)
    return result
