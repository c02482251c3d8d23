"""Pseudo lesions in HU: their places, the HU they add, and equal lesions for equal generators."""

from __future__ import annotations

import pytest
import torch

from medad.anomalies.lesions import Scale, draw_centres, paint_lesions, smooth_field, soft_inside, uniform
from medad.config.anomalies import LesionSettings
from tests.seeded import generator

SIDE = 48


def _slices(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return slices of grey 128 everywhere, with a disc as liver."""
    place = torch.arange(SIDE) - SIDE / 2
    organ = (torch.hypot(place[:, None], place[None]) < 18).expand(batch, 1, SIDE, SIDE)
    return torch.full((batch, 1, SIDE, SIDE), 128.0), organ


def _scale(batch: int, pixel_mm: float = 2.0, grey_per_hu: float = 0.5) -> Scale:
    return Scale(torch.full((batch,), pixel_mm), grey_per_hu)


def test_nothing_outside_the_organ_changes_and_the_truth_is_inside_it() -> None:
    image, organ = _slices(32)
    painted, mask = paint_lesions(image, organ, _scale(32), LesionSettings(), generator())
    assert torch.equal(painted[~organ], image[~organ])
    assert not (mask & ~organ).any()
    assert painted.min() >= 0
    assert painted.max() <= 255
    assert mask.any()
    assert (painted != image)[mask].float().mean() > 0.95


def test_equal_generators_give_equal_lesions_and_other_seeds_others() -> None:
    image, organ = _slices(4)
    first, again, other = (
        paint_lesions(image, organ, _scale(4), LesionSettings(empty_share=0), generator(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("bright_share", "sign"), [(0.0, -1), (1.0, 1)])
def test_a_plain_lesion_has_the_contrast_that_was_asked_for(bright_share: float, sign: int) -> None:
    """Paint round lesions with one contrast, a hard edge and no texture: inside they add 40 HU to 1.5 times that."""
    image, organ = _slices(16)
    settings = LesionSettings(
        most=1, empty_share=0, diameter_mm=(30, 30.001), shortest_axis=1, contrast_hu=(40, 40.001),
        bright_share=bright_share, mixed_share=0, edge_mm=(0.1, 0.1), unevenness=0, texture_hu=(0, 0),
    )  # fmt: skip
    painted, mask = paint_lesions(image, organ, _scale(16), settings, generator())
    added_hu = (painted - image) / 0.5
    assert (sign * added_hu[mask] > 19).all()
    assert (sign * added_hu[mask]).max() < 40 * 1.5 + 0.1
    assert (added_hu[~mask].abs() < 21).all(), "beyond the outline only the softened edge"


def test_the_size_is_the_diameter_in_mm_at_any_pixel_size() -> None:
    """Compare with the area of a circle, for lesions that lie completely inside the organ."""
    organ = torch.ones(24, 1, SIDE, SIDE, dtype=torch.bool)
    image = torch.full((24, 1, SIDE, SIDE), 128.0)
    settings = LesionSettings(
        most=1, empty_share=0, diameter_mm=(20, 20.001), shortest_axis=1, edge_mm=(0.1, 0.1), unevenness=0
    )
    for pixel_mm in (1.5, 3.0):
        _, mask = paint_lesions(image, organ, _scale(24, pixel_mm), settings, generator(3))
        area_mm2 = mask.flatten(1).sum(1).double() * pixel_mm**2
        whole = ~(mask[..., 0].any(-1) | mask[..., -1].any(-1) | mask[..., 0, :].any(-1) | mask[..., -1, :].any(-1))[
            :, 0
        ]
        assert whole.sum() > 3
        expected = torch.pi * 10**2
        assert ((area_mm2[whole] - expected).abs() < 2 * torch.pi * 10 * pixel_mm / 2).all(), "half a pixel of outline"


def test_a_mixed_lesion_holds_both_signs_and_others_one() -> None:
    image, organ = _slices(32)
    plain = {"most": 1, "empty_share": 0.0, "diameter_mm": (30, 34), "texture_hu": (0.0, 0.0), "contrast_hu": (40, 80)}
    for share in (1.0, 0.0):
        painted, mask = paint_lesions(image, organ, _scale(32), LesionSettings(mixed_share=share, **plain), generator())
        added = torch.where(mask, painted - image, 0.0).flatten(1)
        both = ((added > 5).any(1) & (added < -5).any(1)).float().mean()
        assert both > 0.15 if share else both == 0, "half of the parts have the other sign, some too small to show"


def test_the_share_of_healthy_slices() -> None:
    image, organ = _slices(600)
    _, mask = paint_lesions(
        image, organ, _scale(600), LesionSettings(empty_share=0.5, diameter_mm=(12, 30)), generator()
    )
    empty = (~mask.flatten(1).any(1)).float().mean()
    assert abs(float(empty) - 0.5) < 0.09, "four standard deviations of a binomial of 600"


def test_centres_lie_in_the_organ_or_anywhere_when_there_is_none() -> None:
    _, organ = _slices(3)
    organ = organ.clone()
    organ[2] = False
    row, column = draw_centres(organ, 50, generator())
    inside = organ[0, 0][row[0].long(), column[0].long()]
    assert inside.all()
    assert row[2].max() > 40, "of an empty organ, the whole slice"


def test_uniform_and_its_logarithmic_kind_stay_in_their_bounds_with_the_right_median() -> None:
    plain = uniform(2.0, 50.0, (4000,), generator())
    logarithmic = uniform(2.0, 50.0, (4000,), generator(), logarithmic=True)
    for drawn, median in ((plain, 26.0), (logarithmic, 10.0)):
        assert drawn.min() >= 2
        assert drawn.max() <= 50
        assert abs(float((drawn < median).float().mean()) - 0.5) < 0.04


def test_soft_inside_is_one_half_on_the_surface_and_symmetric() -> None:
    distance = torch.linspace(-5, 5, 21)
    inside = soft_inside(distance, torch.tensor(1.0))
    assert inside[10] == 0.5
    assert torch.allclose(inside + inside.flip(0), torch.ones(21))
    assert (inside.diff() <= 0).all()


def test_a_smooth_field_is_standardised_and_smoother_with_a_larger_sigma() -> None:
    rough, smooth = (smooth_field((3, SIDE, SIDE), sigma, generator()) for sigma in (1.0, 6.0))
    for field in (rough, smooth):
        assert torch.allclose(field.mean((-2, -1)), torch.zeros(3), atol=1e-5)
        assert torch.allclose(field.std((-2, -1)), torch.ones(3), atol=1e-5)
    assert smooth.diff().abs().mean() < rough.diff().abs().mean() / 3
