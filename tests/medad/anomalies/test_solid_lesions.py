"""Lesions in three dimensions: their places, sizes and HU, and equal lesions for equal generators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from pydantic import ValidationError
from scipy import ndimage

from medad.anomalies.solid_lesions import SolidLesions, draw_solid_lesions
from medad.config.anomalies import SolidLesionSettings

SPACING_MM = (2.0, 2.0, 3.0)
PLAIN: dict[str, Any] = {
    "most": 1, "diameter_mm": (24, 24), "shortest_axis": 1, "contrast_hu": (40, 40), "bright_share": 0,
    "mixed_share": 0, "ring_share": 0, "edge_mm": (0.1, 0.1), "unevenness": 0, "texture_hu": (0, 0),
}  # fmt: skip


def _organ() -> ndarray:
    """Return an ellipsoid that touches no side of its stack."""
    place = [(np.arange(n) - (n - 1) / 2) / (0.45 * n) for n in (24, 48, 48)]
    square = place[0][:, None, None] ** 2 + place[1][:, None] ** 2 + place[2] ** 2
    found: ndarray = square < 1
    return found


def _draw(organ: ndarray, seed: int, **changes: Any) -> SolidLesions:
    return draw_solid_lesions(organ, SPACING_MM, SolidLesionSettings(**changes), np.random.default_rng(seed))


def test_nothing_lies_outside_the_organ_and_lesions_show() -> None:
    organ = _organ()
    drawn = [_draw(organ, seed) for seed in range(6)]
    for each in drawn:
        assert (each.shift_hu[~organ] == 0).all()
        assert not (each.mask & ~organ).any()
        assert np.isfinite(each.shift_hu).all()
        assert each.shift_hu.dtype == np.float32
    assert sum(each.mask.any() for each in drawn) >= 5
    changed = np.concatenate([np.abs(each.shift_hu[each.mask]) for each in drawn])
    assert np.median(changed) > 5, "the smallest contrast is 8 HU"


def test_equal_generators_give_equal_lesions_and_other_seeds_others() -> None:
    organ = _organ()
    first, again, other = (_draw(organ, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.shift_hu, again.shift_hu)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.mask, other.mask)


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 3.0), (2.5, 1.5, 5.0)])
def test_a_round_lesion_has_the_volume_of_its_diameter_at_any_spacing(
    spacing_mm: tuple[float, float, float],
) -> None:
    """Compare with the volume of a sphere, for lesions that no side of the stack cuts off."""
    organ = np.ones((24, 48, 48), bool)
    settings = SolidLesionSettings(**PLAIN)
    expected = 4 / 3 * np.pi * 12**3
    whole = 0
    for seed in range(30):
        mask = draw_solid_lesions(organ, spacing_mm, settings, np.random.default_rng(seed)).mask
        if any(mask.take(end, axis).any() for axis in range(3) for end in (0, -1)):
            continue
        whole += 1
        volume = np.count_nonzero(mask) * np.prod(spacing_mm)
        assert volume == pytest.approx(expected, rel=0.06)
        middle = ndimage.center_of_mass(mask)
        reach = np.abs(np.argwhere(mask) - middle).max(0) * np.array(spacing_mm[::-1])
        assert (reach <= 12).all()
        assert (reach > 12 - np.array(spacing_mm[::-1])).all()
    assert whole >= 3


@pytest.mark.parametrize(("bright_share", "sign"), [(0.0, -1), (1.0, 1)])
def test_a_plain_lesion_has_the_contrast_that_was_asked_for(bright_share: float, sign: int) -> None:
    """Look at voxels below the outline, where neither its edge nor the plane's thickness changes anything."""
    organ = np.ones((24, 48, 48), bool)
    for seed in range(4):
        drawn = _draw(organ, seed, **PLAIN | {"bright_share": bright_share})
        assert drawn.mask.any()
        deep = ndimage.binary_erosion(drawn.mask, np.ones((3, 3, 3)), border_value=1)
        added = sign * drawn.shift_hu
        assert added[deep].min() > 39
        assert added[deep].max() < 40 * 1.5 + 0.1, "the contrast grows by up to one half towards the centre"
        far = ~ndimage.binary_dilation(drawn.mask, iterations=2)
        assert np.abs(drawn.shift_hu[far]).max() < 1e-3


def test_a_soft_edge_adds_half_of_the_contrast_on_the_outline() -> None:
    """Compare with the law of a step that a Gaussian blurred, along the radius of a large sphere."""
    organ = np.ones((50, 60, 60), bool)
    settings = SolidLesionSettings(**PLAIN | {"diameter_mm": (40, 40), "edge_mm": (3, 3)})
    spacing_mm = (1.0, 1.0, 1.0)
    drawn = draw_solid_lesions(organ, spacing_mm, settings, np.random.default_rng(2))
    outline = drawn.mask ^ ndimage.binary_erosion(drawn.mask, border_value=1)
    around = ndimage.binary_dilation(drawn.mask) ^ drawn.mask
    assert -drawn.shift_hu[outline].mean() == pytest.approx(20 + 20 * 0.13, abs=4)
    assert -drawn.shift_hu[around].mean() == pytest.approx(20 - 20 * 0.13, abs=4)
    assert -drawn.shift_hu[outline].mean() > -drawn.shift_hu[around].mean()


def test_a_mixed_lesion_and_one_with_a_ring_have_both_signs_and_a_plain_one_has_one() -> None:
    organ = np.ones((24, 48, 48), bool)
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "mixed": {"mixed_share": 1}, "ring": {"ring_share": 1}}
    both = dict.fromkeys(kinds, 0)
    for name, change in kinds.items():
        for seed in range(12):
            added = _draw(organ, seed, **PLAIN | {"diameter_mm": (40, 40)} | change).shift_hu
            both[name] += bool(added.max() > 10 and added.min() < -10)
    assert both["plain"] == 0
    assert both["mixed"] >= 3, "half of the second contrasts have the other sign"
    assert both["ring"] >= 3


def test_a_ring_lies_below_the_surface() -> None:
    """Find a lesion whose ring is brighter: its brightest voxels are nearer to the outline than the dark core."""
    organ = np.ones((40, 48, 48), bool)
    checked = 0
    for seed in range(20):
        settings = SolidLesionSettings(**PLAIN | {"diameter_mm": (50, 50), "ring_share": 1})
        drawn = draw_solid_lesions(organ, (2.0, 2.0, 2.0), settings, np.random.default_rng(seed))
        depth = ndimage.distance_transform_edt(np.pad(drawn.mask, 1))[1:-1, 1:-1, 1:-1]
        bright, dark = drawn.mask & (drawn.shift_hu > 30), drawn.mask & (drawn.shift_hu < -30)
        if bright.any() and dark.any():
            checked += 1
            assert depth[bright].mean() < depth[dark].mean()
    assert checked >= 3


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_lesions_cover_at_most_the_largest_share(share: float) -> None:
    organ = _organ()
    covered = [_draw(organ, seed, largest_share=share, most=20).mask.sum() / organ.sum() for seed in range(8)]
    assert max(covered) <= share
    assert max(covered) > 0.2 * share


def test_texture_has_the_standard_deviation_that_was_asked_for() -> None:
    organ = np.ones((24, 48, 48), bool)
    spread = []
    for seed in range(6):
        textured = PLAIN | {"diameter_mm": (60, 60), "texture_hu": (12, 12), "contrast_hu": (8, 8)}
        drawn = _draw(organ, seed, **textured)
        spread.append(float(drawn.shift_hu[ndimage.binary_erosion(drawn.mask, iterations=2)].std()))
    assert np.mean(spread) == pytest.approx(12, abs=2.5)


@pytest.mark.parametrize("change", [{"diameter_mm": (9, 4)}, {"contrast_hu": (0, 4)}, {"texture_hu": (5, 2)}])
def test_a_range_that_falls_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(change))} must be"):
        SolidLesionSettings(**change)
