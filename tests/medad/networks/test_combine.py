"""Combination of the networks' maps, against literal loops and the laws of normalised smoothing."""

from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray
from pydantic import ValidationError
from scipy import ndimage

from medad.config.liver import CombineSettings, InferenceSettings
from medad.networks.combine import combine, outlier_map, smooth
from medad.networks.infer import Prediction
from medad.slices.grid import SliceGrid, Slices

SPACING_MM = (2.0, 2.0, 3.0)


def _case(seed: int = 0) -> tuple[Slices, Prediction]:
    rng = np.random.default_rng(seed)
    organ = np.zeros((7, 20, 20), bool)
    organ[:, 4:17, 3:15] = True
    pixels = np.where(organ, rng.integers(110, 140, organ.shape), 128).astype(np.uint8)
    pixels[2:5, 8:12, 6:10] = 60
    z = np.array([3, 4, 5, 6, 7, 9, 10])
    slices = Slices(pixels, organ, z, SliceGrid((20, 20), 12, 20))
    restored = np.full_like(pixels, 125)
    return slices, Prediction(rng.random(organ.shape).astype(np.float32), restored)


def _smooth_literally(values: ndarray, slices: Slices, sigma_mm: float) -> ndarray:
    """Return for each liver pixel the mean over all liver pixels, with Gaussian weights of the distance in mm."""
    at = np.argwhere(slices.organ)
    place = np.stack([slices.z[at[:, 0]] * SPACING_MM[2], at[:, 1] * SPACING_MM[1], at[:, 2] * SPACING_MM[0]], 1)
    mean = np.zeros(values.shape)
    for here, index in zip(place, at, strict=True):
        weight = np.exp(-0.5 * (((place - here) / sigma_mm) ** 2).sum(1))
        mean[tuple(index)] = (weight * values[slices.organ]).sum() / weight.sum()
    return mean


def test_smoothing_equals_the_literal_mean_also_over_a_missing_plane() -> None:
    slices, prediction = _case()
    got = smooth(prediction.probability, slices, SPACING_MM, 4.0)
    expected = _smooth_literally(prediction.probability, slices, 4.0)
    assert np.abs(got - expected).max() < 2e-3, "scipy cuts its Gaussian at four standard deviations"


def test_smoothing_keeps_constants_and_leaves_out_what_is_outside() -> None:
    slices, prediction = _case()
    values = np.where(slices.organ, np.float32(0.3), np.float32(99))
    got = smooth(values, slices, SPACING_MM, 5.0)
    assert np.allclose(got[slices.organ], 0.3, atol=1e-5)
    assert (got[~slices.organ] == 0).all()
    del prediction


def test_the_default_is_the_segmentation_networks_probability_untouched() -> None:
    slices, prediction = _case()
    assert combine(prediction, slices, SPACING_MM, InferenceSettings()) is prediction.probability


def test_deviation_finds_what_differs_from_most_of_the_liver_and_residual_what_was_restored() -> None:
    slices, prediction = _case()
    lesion = slices.pixels == 60
    for weights in ({"deviation": 1.0}, {"residual": 1.0}):
        chosen = CombineSettings(segmentation=0, scale_mm=2.0, **weights)
        got = combine(prediction, slices, SPACING_MM, InferenceSettings(combine=chosen))
        assert got[lesion].mean() > 0.9
        assert got[slices.organ & ~ndimage.binary_dilation(lesion, iterations=4)].max() < 0.5


def test_weights_mix_linearly() -> None:
    slices, prediction = _case()
    parts = [
        combine(prediction, slices, SPACING_MM, InferenceSettings(combine=CombineSettings(**weights)))
        for weights in (
            {"segmentation": 1.0},
            {"segmentation": 0.0, "residual": 1.0},
            {"segmentation": 0.0, "deviation": 1.0},
        )
    ]
    mixed = CombineSettings(segmentation=0.5, residual=0.2, deviation=0.3)
    got = combine(prediction, slices, SPACING_MM, InferenceSettings(combine=mixed))
    assert np.allclose(got, 0.5 * parts[0] + 0.2 * parts[1] + 0.3 * parts[2], atol=1e-6)


def test_unusual_is_one_half_at_the_chosen_z() -> None:
    """Compute z by its definition, from median and MAD of the smoothed difference in the liver."""
    slices, _ = _case()
    difference = np.abs(slices.pixels.astype(np.float32) - 125)
    settings = CombineSettings(scale_mm=3.0, centre_z=2.0)
    mean = smooth(difference, slices, SPACING_MM, 3.0)[slices.organ]
    z = (mean - np.median(mean)) / (1.4826 * np.median(np.abs(mean - np.median(mean))))
    got = outlier_map(difference, slices, SPACING_MM, settings)
    assert np.allclose(got[slices.organ], 1 / (1 + np.exp(-np.clip(z - 2, -30, 30))), atol=1e-4)
    assert (got[~slices.organ] == 0).all()


def test_weights_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValidationError, match="add up to 1"):
        CombineSettings(segmentation=0.7, deviation=0.2)
