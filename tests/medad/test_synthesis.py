"""The meant eq. 3.1, and the laws of the drawn contrast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from medad.config import SynthesisSettings
from medad.synthesis import draw_shift, overlay, synthesise

SETTINGS = SynthesisSettings(blur_sigma_px=5.0, ellipse_px=3, threshold_grey=170.0)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _healthy(batch: int = 4, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    organ = torch.zeros(batch, 1, side, side, dtype=torch.bool)
    organ[:, :, 10:50, 14:60] = True
    image = torch.where(organ, torch.randint(1, 256, organ.shape, generator=_generator(9)).float(), 0.0)
    return image, organ


def test_overlay_by_hand() -> None:
    image = torch.tensor([[[[10.0, 200.0], [10.0, 200.0]]]])
    mask = torch.tensor([[[[True, True], [False, False]]]])
    shifted = overlay(image, mask, torch.full((1, 1, 1, 1), 80.0))
    assert shifted.flatten().tolist() == [90.0, 255.0, 10.0, 200.0]
    shifted = overlay(image, mask, torch.full((1, 1, 1, 1), -80.0))
    assert shifted.flatten().tolist() == [0.0, 120.0, 10.0, 200.0]


def test_only_the_mask_changes_and_by_one_constant() -> None:
    image, organ = _healthy()
    made = synthesise(image, organ, SETTINGS, _generator())
    assert made.mask.any()
    assert (made.mask <= organ).all()
    assert torch.equal(made.image[~made.mask], image[~made.mask])
    for before, after, mask in zip(image, made.image, made.mask, strict=True):
        change = (after - before)[mask & (after > 0) & (after < 255)]
        if len(change):
            assert 60 <= change[0].abs() <= 100
            assert (change == change[0]).all() or torch.allclose(change, change[0].expand_as(change), atol=2e-5)


def test_equal_generators_give_equal_batches_and_others_do_not() -> None:
    image, organ = _healthy()
    first, again = (synthesise(image, organ, SETTINGS, _generator(5)) for _ in range(2))
    other = synthesise(image, organ, SETTINGS, _generator(6))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)


def test_no_liver_means_no_anomaly() -> None:
    image, organ = _healthy()
    made = synthesise(image, torch.zeros_like(organ), SETTINGS, _generator())
    assert not made.mask.any()
    assert torch.equal(made.image, image)


def test_uniform_shift_follows_its_law() -> None:
    shift = draw_shift(20_000, SynthesisSettings(), _generator(1)).flatten().double().numpy()
    assert np.abs(shift).min() >= 60
    assert np.abs(shift).max() <= 100
    assert stats.kstest(np.abs(shift), "uniform", args=(60, 40)).pvalue > 1e-3
    assert stats.binomtest(int((shift > 0).sum()), len(shift)).pvalue > 1e-3


def test_normal_shift_follows_its_law() -> None:
    chosen = SynthesisSettings(shift_distribution="normal", shift_grey=(20.0, 100.0))
    shift = draw_shift(20_000, chosen, _generator(2)).flatten().double().numpy()
    assert np.abs(shift).min() >= 20
    assert np.abs(shift).max() <= 100
    law = stats.truncnorm(20 / 50, 100 / 50, scale=50)
    assert stats.kstest(np.abs(shift), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("wrong", [{"shift_grey": (100, 60)}, {"ellipse_px": 8}, {"threshold_grey": 255}])
def test_settings_refuse(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SynthesisSettings.model_validate(wrong)
