"""Augmentation of healthy livers in three dimensions: what may change, and by how much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from pydantic import ValidationError
from scipy import ndimage

from medad.classifier.augmentation import add_stack_noise, augment_stack, fissures, vessel_tree, wave
from medad.classifier.features import LiverStack
from medad.config.anomalies import AugmentationSettings
from medad.config.training import ClassifierSettings

SPACING_MM = (3.0, 2.0, 2.0)
SPACING = np.array(SPACING_MM)
STILL: dict[str, Any] = {"gain_log": 0, "field_hu": 0, "shade_hu": (0, 0), "rim_px": 0}


def _liver(seed: int = 0) -> LiverStack:
    place = [(np.arange(n) - (n - 1) / 2) / (0.42 * n) for n in (16, 40, 40)]
    organ = place[0][:, None, None] ** 2 + place[1][:, None] ** 2 + place[2] ** 2 < 1
    hu = np.random.default_rng(seed).normal(0, 10, organ.shape)
    return LiverStack(np.where(organ, hu, -77).astype(np.float32), organ, SPACING_MM)


def _augment(liver: LiverStack, seed: int = 0, vessel_share: float = 0, **changes: Any) -> ndarray:
    settings = ClassifierSettings(vessel_share=vessel_share, fissure_share=0)
    return augment_stack(liver, AugmentationSettings(**changes), settings, np.random.default_rng(seed))


def test_nothing_changes_outside_the_liver_and_something_inside() -> None:
    liver = _liver()
    for seed in range(8):
        got = _augment(liver, seed, vessel_share=1)
        assert np.array_equal(got[~liver.organ], liver.hu[~liver.organ])
        assert np.abs(got - liver.hu)[liver.organ].mean() > 0.5
        assert np.isfinite(got).all()
        assert got.dtype == np.float32


def test_equal_generators_give_equal_livers_and_other_seeds_others() -> None:
    liver = _liver()
    first, again, other = (_augment(liver, seed, vessel_share=1) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_any_change_the_liver_stays() -> None:
    liver = _liver()
    assert np.allclose(_augment(liver, **STILL), liver.hu, atol=1e-4)


def test_the_contrast_is_a_factor_about_the_median() -> None:
    liver = _liver()
    middle = np.median(liver.hu[liver.organ])
    factors = []
    for seed in range(10):
        got = _augment(liver, seed, **STILL | {"gain_log": 0.2})
        ratio = (got - middle)[liver.organ] / (liver.hu - middle)[liver.organ]
        far = np.abs(liver.hu - middle)[liver.organ] > 5
        assert np.ptp(ratio[far]) < 1e-3
        factors.append(float(np.median(ratio[far])))
    assert np.exp(-0.2) - 1e-3 <= min(factors) < 0.97
    assert 1.03 < max(factors) <= np.exp(0.2) + 1e-3


def test_a_shade_lies_between_its_bounds_and_leaves_one_side_alone() -> None:
    liver = _liver()
    for seed in range(6):
        got = _augment(liver, seed, **STILL | {"shade_hu": (-40, -30), "shade_mm": (6, 6)})
        added = (got - liver.hu)[liver.organ]
        assert -40.01 <= added.min() < -14
        assert added.max() <= 1e-3


def test_the_rim_is_as_wide_as_the_settings_say() -> None:
    liver = _liver()
    added = _augment(liver, **STILL | {"rim_px": 3, "rim_hu": (40, 40)}) - liver.hu
    near = liver.organ & (liver.depth_mm < 6)
    assert np.abs(added[liver.organ & ~near]).max() < 1e-4
    assert added[near].min() >= -1e-4
    assert added[near].max() <= 40
    assert added[near & (liver.depth_mm <= 2)].mean() > 5


def test_bright_and_dark_vessels_have_the_chosen_contrast() -> None:
    liver = _liver()
    settings = ClassifierSettings(vessel_share=1, vessel_hu=(50, 50), fissure_share=0)
    peaks = []
    for seed in range(16):
        got = augment_stack(liver, AugmentationSettings(**STILL), settings, np.random.default_rng(seed))
        added = (got - liver.hu)[liver.organ]
        peaks.append(round(float(added[np.abs(added).argmax()]), 2))
    assert set(peaks) == {50.0, -15.0}
    assert peaks.count(50.0) > peaks.count(-15.0)


def test_vessels_are_trees_inside_the_organ() -> None:
    """Count voxels deeper than half of the largest diameter: thin, curved vessels have none."""
    organ = _liver().organ
    for seed in range(8):
        tree = vessel_tree(organ, SPACING, (3.0, 14.0), np.random.default_rng(seed))
        assert tree.min() >= 0
        assert tree.max() == 1
        assert (tree[~organ] == 0).all()
        share = (tree[organ] > 0.5).mean()
        assert 0.002 < share < 0.9
    thin = vessel_tree(organ, SPACING, (3.0, 3.0), np.random.default_rng(0))
    pieces = ndimage.label(thin > 0.2, np.ones((3, 3, 3)))[0]
    largest = np.bincount(pieces[pieces > 0]).argmax()
    reach = np.ptp(np.argwhere(pieces == largest) * SPACING, axis=0).max()
    assert reach > 12, "a tree is longer than its vessels are wide"


def test_fissures_are_thin_and_inside_the_organ() -> None:
    organ = _liver().organ
    for seed in range(12):
        painted = fissures(organ, SPACING, np.random.default_rng(seed))
        assert 0 == painted.min() < painted.max() <= 1
        assert not painted[~organ].any()
        # half a sheet of 5 mm, a strand of 9 mm, and crossings of both
        assert ndimage.distance_transform_edt(painted > 0.5, sampling=SPACING).max() < 8


def test_painted_fat_has_the_chosen_contrast() -> None:
    liver = _liver()
    settings = ClassifierSettings(vessel_share=0, fissure_share=1, fissure_hu=(-150, -150))
    for seed in range(6):
        got = augment_stack(liver, AugmentationSettings(**STILL), settings, np.random.default_rng(seed))
        changed = np.abs(got - liver.hu) > 1e-3
        assert changed.any()
        assert not changed[~liver.organ].any()
        assert (got - liver.hu)[changed].max() < 0
        assert got[changed].min() >= -150 - 1e-3


def test_a_wave_is_standardised_and_smoother_over_a_longer_length() -> None:
    short, long = (wave((16, 40, 40), SPACING, mm, np.random.default_rng(0)) for mm in (10.0, 60.0))
    for field in (short, long):
        assert float(field.mean()) == pytest.approx(0, abs=1e-4)
        assert float(field.std()) == pytest.approx(1, abs=1e-3)
    assert np.abs(np.diff(long, axis=2)).mean() < np.abs(np.diff(short, axis=2)).mean() / 2


def test_noise_has_the_chosen_standard_deviation_and_stays_inside() -> None:
    liver = _liver()
    for seed in range(4):
        noisy = add_stack_noise(liver.hu, liver.organ, (9.0, 9.0), np.random.default_rng(seed))
        assert np.array_equal(noisy[~liver.organ], liver.hu[~liver.organ])
        assert (noisy - liver.hu)[liver.organ].std() == pytest.approx(9, rel=0.08)
    silent = add_stack_noise(liver.hu, liver.organ, (0.0, 0.0), np.random.default_rng(0))
    assert np.array_equal(silent, liver.hu)


@pytest.mark.parametrize("change", [{"vessel_hu": (0, 50)}, {"vessel_hu": (60, 50)}, {"noise_hu": (5, 2)}])
def test_classifier_ranges_that_cannot_be_drawn_from_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(change))} must be"):
        ClassifierSettings(**change)


@pytest.mark.parametrize("change", [{"shade_mm": (0, 5)}, {"vessel_mm": (5, 3)}, {"rim_hu": (5, -5)}])
def test_augmentation_ranges_that_cannot_be_drawn_from_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(change))} must be"):
        AugmentationSettings(**change)
