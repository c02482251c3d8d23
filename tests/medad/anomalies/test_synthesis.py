"""The intended eq. 3.1, the distribution of the drawn contrast, and DRAEM's textures in Perlin masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from medad.anomalies.synthesis import add_shift, blend, draw_shift, synthesise
from medad.anomalies.textures import Textures
from medad.config.anomalies import SynthesisSettings, TextureSettings
from tests.seeded import generator

SETTINGS = SynthesisSettings(blur_sigma_px=5.0, ellipse_px=3, threshold_grey=170.0)


def _healthy(batch: int = 4, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    organ = torch.zeros(batch, 1, side, side, dtype=torch.bool)
    organ[:, :, 10:50, 14:60] = True
    image = torch.where(organ, torch.randint(1, 256, organ.shape, generator=generator(9)).float(), 0.0)
    return image, organ


def test_add_shift_by_hand() -> None:
    image = torch.tensor([[[[10.0, 200.0], [10.0, 200.0]]]])
    mask = torch.tensor([[[[True, True], [False, False]]]])
    shifted = add_shift(image, mask, torch.full((1, 1, 1, 1), 80.0))
    assert shifted.flatten().tolist() == [90.0, 255.0, 10.0, 200.0]
    shifted = add_shift(image, mask, torch.full((1, 1, 1, 1), -80.0))
    assert shifted.flatten().tolist() == [0.0, 120.0, 10.0, 200.0]


def test_only_the_mask_changes_and_by_one_constant() -> None:
    image, organ = _healthy()
    made = synthesise(image, organ, SETTINGS, generator())
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
    first, again = (synthesise(image, organ, SETTINGS, generator(5)) for _ in range(2))
    other = synthesise(image, organ, SETTINGS, generator(6))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)


def test_no_liver_means_no_anomaly() -> None:
    image, organ = _healthy()
    made = synthesise(image, torch.zeros_like(organ), SETTINGS, generator())
    assert not made.mask.any()
    assert torch.equal(made.image, image)


def test_uniform_shift_follows_its_law() -> None:
    shift = draw_shift(20_000, SynthesisSettings(), generator(1)).flatten().double().numpy()
    assert np.abs(shift).min() >= 60
    assert np.abs(shift).max() <= 100
    assert stats.kstest(np.abs(shift), "uniform", args=(60, 40)).pvalue > 1e-3
    assert stats.binomtest(int((shift > 0).sum()), len(shift)).pvalue > 1e-3


def test_normal_shift_follows_its_law() -> None:
    chosen = SynthesisSettings(shift_distribution="normal", shift_grey=(20.0, 100.0))
    shift = draw_shift(20_000, chosen, generator(2)).flatten().double().numpy()
    assert np.abs(shift).min() >= 20
    assert np.abs(shift).max() <= 100
    law = stats.truncnorm(20 / 50, 100 / 50, scale=50)
    assert stats.kstest(np.abs(shift), law.cdf).pvalue > 1e-3


class Flat(Textures):
    """A texture of one grey value."""

    digest = "flat"
    grey = 250.0

    def draw(self, generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
        return torch.full((len(generators), 1, 64, 64), self.grey, device=device)


def _textured(**changes: object) -> SynthesisSettings:
    texture = {"clean_share": 0.0, "scale_exponents": (1, 3), "threshold": 0.2} | changes
    return SynthesisSettings.model_validate({"kind": "perlin_texture", "texture": texture})


def test_blend_by_hand() -> None:
    image = torch.tensor([[[[100.0, 100.0], [0.0, 40.0]]]])
    texture = torch.tensor([[[[200.0, 200.0], [80.0, 80.0]]]])
    mask = torch.tensor([[[[True, False], [True, False]]]])
    # beta 0.75: I_s = 0.25 * A + 0.75 * I in the mask
    blended = blend(image, mask, texture, torch.full((1, 1, 1, 1), 0.25))
    assert blended.flatten().tolist() == [125.0, 100.0, 20.0, 40.0]


def test_textures_lie_in_perlin_masks_and_in_the_liver_alone() -> None:
    image, organ = _healthy(8)
    made = synthesise(image, organ, _textured(opacity=(1.0, 1.0)), generator(1), Flat())
    assert made.mask.flatten(1).any(1).sum() > 4
    assert (made.mask <= organ).all()
    assert torch.equal(made.image[~made.mask], image[~made.mask])
    assert (made.image[made.mask] == Flat.grey).all()
    everywhere = synthesise(image, torch.ones_like(organ), _textured(), generator(1), Flat())
    assert torch.equal(made.mask, everywhere.mask & organ), "the liver cuts the mask and decides nothing else"


def test_the_opacity_is_one_number_a_slice_and_follows_its_law() -> None:
    organ = torch.ones(64, 1, 64, 64, dtype=torch.bool)
    made = synthesise(torch.full(organ.shape, 50.0), organ, _textured(opacity=(0.2, 1.0)), generator(2), Flat())
    shares = []
    for image, mask in zip(made.image, made.mask, strict=True):
        if mask.any():
            share = (image[mask] - 50) / (Flat.grey - 50)
            assert share.max() - share.min() < 1e-5
            shares.append(float(share[0]))
    assert len(shares) > 40
    assert stats.kstest(shares, "uniform", args=(0.2, 0.8)).pvalue > 1e-3


def test_a_share_of_slices_stays_clean() -> None:
    organ = torch.ones(200, 1, 64, 64, dtype=torch.bool)
    image = torch.full(organ.shape, 50.0)
    # the threshold paints almost every pixel, so an empty mask means an unchanged slice
    made = synthesise(image, organ, _textured(clean_share=0.5, threshold=-0.9), generator(3), Flat())
    painted = made.mask.flatten(1).any(1)
    assert stats.binomtest(int(painted.sum()), 200).pvalue > 1e-3
    assert torch.equal(made.image[~painted], image[~painted])


def test_a_textured_batch_is_a_function_of_its_generator() -> None:
    image, organ = _healthy(8)
    settings = _textured()
    first, again = (synthesise(image, organ, settings, generator(5)) for _ in range(2))
    other = synthesise(image, organ, settings, generator(6))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)
    shorter = synthesise(image[:3], organ[:3], settings, generator(5))
    assert torch.equal(shorter.image, first.image[:3]), "each slice's numbers are its own"


@pytest.mark.parametrize(
    "wrong", [{"opacity": (0.5, 1.2)}, {"scale_exponents": (3, 2)}, {"scale_exponents": (0, 9)}, {"clean_share": 1.0}]
)
def test_texture_settings_refuse(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TextureSettings.model_validate(wrong)


@pytest.mark.parametrize("wrong", [{"shift_grey": (100, 60)}, {"ellipse_px": 8}, {"threshold_grey": 255}])
def test_settings_refuse(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SynthesisSettings.model_validate(wrong)
