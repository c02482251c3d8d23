"""Combination of the networks' outputs into one probability map per volume, on the slice grid.

The thesis uses the segmentation network's probability of each slice. Two more maps need no second network. One shows
how much the restoration changed a pixel; the other shows how far a pixel is from the median of this liver. A fourth map
is that of the voxel classifier. Smoothing also uses the neighbouring planes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.base.numbers import logit
from medad.base.robust import robust_sd
from medad.config.liver import CombineSettings, InferenceSettings
from medad.networks.infer import Prediction
from medad.slices.grid import Slices


def combine(
    prediction: Prediction,
    slices: Slices,
    spacing_mm: tuple[float, float, float],
    settings: InferenceSettings,
    classified: Float32[ndarray, "N S S"] | None = None,
) -> Float32[ndarray, "N S S"]:
    """Return the weighted mean of the maps, smoothed within the liver.

    Parameters
    ----------
    prediction
        Result of `medad.networks.infer.predict` for these slices.
    slices
        Prepared slices that were the input.
    spacing_mm
        Pixel size along columns and rows, and the distance between planes (`Prepared.spacing_mm`).
    settings
        `combine` and `smooth_mm` are used. With their defaults the segmentation network's probability is returned
        unchanged.
    classified
        Map of the voxel classifier, 0..1. None: its weight must be 0.

    Returns
    -------
    P(tumour), 0..1. If anything was smoothed, it is 0 outside the liver.
    """
    chosen = settings.combine
    combined = prediction.probability
    if chosen.segmentation < 1:
        grey = slices.pixels.astype(np.float32)
        maps = [(chosen.segmentation, combined)]
        if chosen.residual > 0:
            difference = np.abs(grey - prediction.restored)
            maps.append((chosen.residual, outlier_map(difference, slices, spacing_mm, chosen)))
        if chosen.deviation > 0:
            difference = np.abs(grey - np.float32(np.median(slices.pixels[slices.organ])))
            maps.append((chosen.deviation, outlier_map(difference, slices, spacing_mm, chosen)))
        if chosen.classifier > 0:
            assert classified is not None
            maps.append((chosen.classifier, classified))
        combined = _weighted_mean(maps, slices.organ, chosen)
    if settings.smooth_mm > 0:
        combined = smooth(combined, slices, spacing_mm, settings.smooth_mm)
    return combined


def _weighted_mean(
    maps: Sequence[tuple[float, Float32[ndarray, "N S S"]]], organ: Bool[ndarray, "N S S"], settings: CombineSettings
) -> Float32[ndarray, "N S S"]:
    """Return the weighted mean of maps in 0..1, on the scale of the settings. On the logit scale it is 0 outside."""
    total = np.zeros(organ.shape, np.float32)
    for weight, values in maps:
        total += np.float32(weight) * (logit(values) if settings.scale == "logit" else values)
    return _zero_outside(1 / (1 + np.exp(-total)), organ) if settings.scale == "logit" else total


def outlier_map(
    difference: Float32[ndarray, "N S S"],
    slices: Slices,
    spacing_mm: tuple[float, float, float],
    settings: CombineSettings,
) -> Float32[ndarray, "N S S"]:
    """Return how unusual a difference is within this liver, 0..1: the logistic function of its robust z-score.

    The difference is first averaged over its neighbourhood. Then z = (mean - median) / (1.4826 MAD), with median and
    MAD over the liver. The map is 1/2 at z = `settings.centre_z`, and 0 outside the liver.
    """
    mean = smooth(difference, slices, spacing_mm, settings.scale_mm)
    inside = mean[slices.organ]
    middle = np.median(inside)
    spread = max(robust_sd(inside), 1e-3)
    z = np.clip((mean - middle) / spread - settings.centre_z, -30, 30)
    return np.where(slices.organ, 1 / (1 + np.exp(-z)), 0).astype(np.float32)


def smooth(
    values: Float32[ndarray, "N S S"], slices: Slices, spacing_mm: tuple[float, float, float], sigma_mm: float
) -> Float32[ndarray, "N S S"]:
    """Return the Gaussian mean over liver pixels only (normalised convolution).

    Planes without a prepared slice count as outside the liver.
    """
    x_mm, y_mm, z_mm = spacing_mm
    sigma = (sigma_mm / z_mm, sigma_mm / y_mm, sigma_mm / x_mm)
    place = slices.z - slices.z[0]
    shape = (int(place[-1]) + 1, *values.shape[1:])
    total, weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    total[place] = np.where(slices.organ, values, 0)
    weight[place] = slices.organ
    total = ndimage.gaussian_filter(total, sigma, mode="constant")[place]
    weight = ndimage.gaussian_filter(weight, sigma, mode="constant")[place]
    return _zero_outside(total / np.maximum(weight, np.float32(1e-6)), slices.organ)


def _zero_outside(values: Float32[ndarray, "N S S"], organ: Bool[ndarray, "N S S"]) -> Float32[ndarray, "N S S"]:
    return np.where(organ, values, np.float32(0))
