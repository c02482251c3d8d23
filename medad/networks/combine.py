"""From what the networks say of each slice to one probability map of the volume, still on the slice grid.

The thesis takes the segmentation network's probability slice by slice. Beside it there are two maps that need no second
network: how much the restoration changed, and how far the tissue is from most of this liver; and neighbouring planes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.config.liver import CombineSettings, InferenceSettings
from medad.networks.infer import Prediction
from medad.slices.grid import Slices

_MAD_TO_SD = 1.4826


def combine(
    prediction: Prediction, slices: Slices, spacing_mm: tuple[float, float, float], settings: InferenceSettings
) -> Float32[ndarray, "N S S"]:
    """Weighted mean of the maps, then smoothed within the liver.

    Parameters
    ----------
    prediction
        Of `medad.networks.infer.predict` on these slices.
    slices
        The query.
    spacing_mm
        A pixel along columns and rows, and the distance of planes (`PreparedCase.spacing_mm`).
    settings
        `combine` and `smooth_mm`; at their defaults the segmentation network's probability is returned as it is.

    Returns
    -------
    P(tumour), 0..1; where anything was smoothed, 0 outside the liver.
    """
    chosen = settings.combine
    combined = prediction.probability
    if chosen.segmentation < 1:
        combined = combined * np.float32(chosen.segmentation)
        grey = slices.pixels.astype(np.float32)
        if chosen.residual > 0:
            difference = np.abs(grey - prediction.restored)
            combined += np.float32(chosen.residual) * unusual(difference, slices, spacing_mm, chosen)
        if chosen.deviation > 0:
            difference = np.abs(grey - np.float32(np.median(slices.pixels[slices.organ])))
            combined += np.float32(chosen.deviation) * unusual(difference, slices, spacing_mm, chosen)
    if settings.smooth_mm > 0:
        combined = smooth(combined, slices, spacing_mm, settings.smooth_mm)
    return combined


def unusual(
    difference: Float32[ndarray, "N S S"],
    slices: Slices,
    spacing_mm: tuple[float, float, float],
    settings: CombineSettings,
) -> Float32[ndarray, "N S S"]:
    """How unusual a difference, averaged over its neighbourhood, is in this liver: logistic of its robust z-score.

    z = (mean - median) / (1.4826 MAD) over the liver; 1 / 2 where z is `settings.centre_z`. 0 outside the liver.
    """
    mean = smooth(difference, slices, spacing_mm, settings.scale_mm)
    inside = mean[slices.organ]
    middle = np.median(inside)
    spread = max(float(np.median(np.abs(inside - middle))) * _MAD_TO_SD, 1e-3)
    z = np.clip((mean - middle) / spread - settings.centre_z, -30, 30)
    return np.where(slices.organ, 1 / (1 + np.exp(-z)), 0).astype(np.float32)


def smooth(
    values: Float32[ndarray, "N S S"], slices: Slices, spacing_mm: tuple[float, float, float], sigma_mm: float
) -> Float32[ndarray, "N S S"]:
    """Gaussian mean over the liver's pixels alone (normalised convolution); planes without slice count as outside."""
    x_mm, y_mm, z_mm = spacing_mm
    sigma = (sigma_mm / z_mm, sigma_mm / y_mm, sigma_mm / x_mm)
    place = slices.z - slices.z[0]
    shape = (int(place[-1]) + 1, *values.shape[1:])
    total, weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    total[place] = np.where(slices.organ, values, 0)
    weight[place] = slices.organ
    total = ndimage.gaussian_filter(total, sigma, mode="constant")[place]
    weight = ndimage.gaussian_filter(weight, sigma, mode="constant")[place]
    return _inside(total / np.maximum(weight, np.float32(1e-6)), slices.organ)


def _inside(values: Float32[ndarray, "N S S"], organ: Bool[ndarray, "N S S"]) -> Float32[ndarray, "N S S"]:
    return np.where(organ, values, np.float32(0))
