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


def _logit(p: ndarray) -> ndarray:
    found: ndarray = np.log(p / (1 - p))
    return found


def test_on_the_logit_scale_maps_are_averaged_as_odds() -> None:
    """Two maps of probability 0.9 and 0.2 at weights 0.25 and 0.75 have odds 9^0.25 * 0.25^0.75."""
    slices, prediction = _case()
    sure = np.full_like(prediction.probability, 0.9)
    classified = np.full_like(sure, 0.2)
    chosen = CombineSettings(scale="logit", segmentation=0.25, classifier=0.75)
    got = combine(
        Prediction(sure, prediction.restored), slices, SPACING_MM, InferenceSettings(combine=chosen), classified
    )
    odds = 9**0.25 * 0.25**0.75
    assert np.allclose(got[slices.organ], odds / (1 + odds), atol=1e-6)
    assert (got[~slices.organ] == 0).all()


def test_the_classifiers_map_joins_on_both_scales() -> None:
    slices, prediction = _case()
    classified = np.random.default_rng(5).uniform(0.01, 0.99, slices.organ.shape).astype(np.float32)
    for scale in ("probability", "logit"):
        chosen = CombineSettings.model_validate({"scale": scale, "segmentation": 0.4, "classifier": 0.6})
        got = combine(prediction, slices, SPACING_MM, InferenceSettings(combine=chosen), classified)
        if scale == "probability":
            expected = 0.4 * prediction.probability + 0.6 * classified
        else:
            total = 0.4 * _logit(prediction.probability.astype(float)) + 0.6 * _logit(classified.astype(float))
            expected = np.where(slices.organ, 1 / (1 + np.exp(-total)), 0)
        assert np.allclose(got, expected, atol=1e-5)


def test_certainty_of_one_map_stays_finite_on_the_logit_scale() -> None:
    """A logit is at most 12, so a map that is 1 everywhere moves an even map to sigmoid(6) and not to 1."""
    slices, prediction = _case()
    one, even = np.ones_like(prediction.probability), np.full_like(prediction.probability, 0.5)
    chosen = CombineSettings(scale="logit", segmentation=0.5, classifier=0.5)
    got = combine(Prediction(one, prediction.restored), slices, SPACING_MM, InferenceSettings(combine=chosen), even)
    assert np.allclose(got[slices.organ], 1 / (1 + np.exp(-6)), atol=1e-6)


def test_weights_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValidationError, match="add up to 1"):
        CombineSettings(segmentation=0.7, deviation=0.2)
