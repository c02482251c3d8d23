"""Augmentation: it changes only the liver, does nothing at zero strength, and each kind has its intended effect."""

from __future__ import annotations

import torch

from medad.anomalies.augment import add_noise, augment, rim_hu, shade_hu, vessels_hu
from medad.anomalies.lesions import Scale
from medad.config.anomalies import AugmentationSettings
from tests.seeded import generator

SIDE = 48
NONE = AugmentationSettings(
    offset_hu=0, gain_log=0, field_hu=0, shade_hu=(0, 0), vessels=0, rim_px=0, noise_hu=(0, 0)
)  # fmt: skip


def _liver(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(SIDE) - SIDE / 2
    organ = (torch.hypot(place[:, None], place[None]) < 18).expand(batch, 1, SIDE, SIDE)
    noise = torch.randn(batch, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(9)) * 6
    return torch.where(organ, 128 + noise, 128.0), organ


def _scale(batch: int) -> Scale:
    return Scale(torch.full((batch,), 2.0), 0.85)


def test_at_zero_strength_nothing_changes() -> None:
    image, organ = _liver(4)
    assert torch.allclose(augment(image, organ, _scale(4), NONE, generator()), image, atol=1e-4)
    assert torch.equal(add_noise(image, organ, _scale(4), NONE, generator()), image)


def test_only_the_liver_changes_and_equal_generators_agree() -> None:
    image, organ = _liver(8)
    for change in (augment, add_noise):
        first, again = (change(image, organ, _scale(8), AugmentationSettings(), generator(5)) for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(first[~organ], image[~organ])
        assert (first != image)[organ].float().mean() > 0.9
        assert first.min() >= 0
        assert first.max() <= 255


def test_the_offset_moves_the_whole_liver_and_the_gain_keeps_its_mean() -> None:
    image, organ = _liver(64)
    moved = augment(image, organ, _scale(64), NONE.model_copy(update={"offset_hu": 10.0}), generator())
    shift = (moved - image).masked_fill(~organ, 0).flatten(1)
    mean = shift.sum(1) / organ.flatten(1).sum(1)
    spread = torch.where(organ.flatten(1), (shift - mean[:, None]).abs(), 0.0)
    assert spread.max() < 1e-3
    assert 0.5 * 10 * 0.85 < mean.abs().max() <= 10 * 0.85 + 1e-3
    gained = augment(image, organ, _scale(64), NONE.model_copy(update={"gain_log": 0.5}), generator())
    sd = torch.stack([part[where].std() for part, where in zip(gained, organ, strict=True)])
    before = torch.stack([part[where].std() for part, where in zip(image, organ, strict=True)])
    means = torch.stack([part[where].mean() for part, where in zip(gained - image, organ, strict=True)])
    assert means.abs().max() < 0.01
    assert 0.6 < (sd / before).min() < 0.8
    assert 1.3 < (sd / before).max() < 1.65


def test_noise_has_the_strength_that_was_asked_for() -> None:
    image, organ = _liver(6)
    flat = torch.full_like(image, 128.0)
    noisy = add_noise(flat, organ, _scale(6), NONE.model_copy(update={"noise_hu": (12.0, 12.0)}), generator())
    for part, where in zip(noisy, organ, strict=True):
        assert abs(float(part[where].std()) / 0.85 - 12) < 2


def test_a_shade_parts_the_slice_in_two_over_the_width_that_was_asked_for() -> None:
    organ = torch.ones(32, 1, 96, 96, dtype=torch.bool)
    steepest = []
    for width_mm in (8.0, 32.0):
        settings = AugmentationSettings(shade_hu=(-30, -29.999), shade_mm=(width_mm, width_mm + 1e-3))
        hu = shade_hu(organ, _scale(32), settings, generator())[:, 0]
        assert hu.min() >= -30
        assert hu.max() <= 0
        down, right = (hu[:, 2:, 1:-1] - hu[:, :-2, 1:-1]) / 2, (hu[:, 1:-1, 2:] - hu[:, 1:-1, :-2]) / 2
        steepest.append(torch.hypot(down, right).flatten(1).amax(1).median())
    # a logistic step of width w px is steepest in its middle: 30 / w per pixel of 2 mm; waves make it steeper
    assert 0.85 * 30 / 4 < steepest[0] < 1.3 * 30 / 4
    assert 0.85 * 30 / 16 < steepest[1] < 1.3 * 30 / 16
    hu = shade_hu(organ, _scale(32), AugmentationSettings(shade_hu=(20, 20.001), shade_mm=(8, 8.001)), generator())
    parted = (hu > 19).flatten(1).float().mean(1)
    assert 0.2 < parted.mean() < 0.8
    assert ((hu < 1) | (hu > 19)).float().mean() > 0.9, "two sides and little between"


def test_vessels_have_the_hu_and_the_width_that_were_asked_for() -> None:
    _, organ = _liver(16)
    settings = AugmentationSettings(vessels=1, vessel_hu=(50, 50.001), vessel_mm=(8, 8.001), vessel_length=(8, 8.001))
    hu = vessels_hu(organ, _scale(16), settings, generator())
    assert hu.min() >= 0
    assert abs(float(hu.max()) - 50) < 0.5
    shown = hu.flatten(1).amax(1) > 25
    assert 0 < int(shown.sum()) < 16, "none or one a slice"
    # in a straight vessel of 4 px width a disc of radius 2 px fits, but a disc of radius 4 px does not
    for part in hu[shown, 0] > 25:
        width = torch.nn.functional.max_pool2d(-part[None, None].float(), 7, 1, 3)
        assert width.max() == 0, "no 7 x 7 square fits into a tube of 4 px"


def test_the_rim_lies_along_the_outline() -> None:
    _, organ = _liver(4)
    settings = AugmentationSettings(rim_px=2, rim_hu=(-60, -59.999))
    hu = rim_hu(organ, settings, generator())
    place = torch.arange(SIDE) - SIDE / 2
    depth = (18 - torch.hypot(place[:, None], place[None])).expand_as(hu)
    assert hu[organ & (depth < 1)].mean() < -10
    assert hu[organ & (depth > 6)].abs().max() < 0.5
    assert hu[~organ].abs().max() == 0
