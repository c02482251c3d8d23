"""Each check of a liver mask, on a torso by construction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from medad.base.errors import InputError
from medad.ct.io import Volume
from medad.organ.checks import check, check_given
from tests.medad.organ.torso import Torso, make_torso


@pytest.fixture(scope="module")
def torso() -> Torso:
    return make_torso()


def problems_of(torso: Torso, mask: np.ndarray, sureness: float = 1.0) -> str:
    return "; ".join(check(torso.hu, mask, torso.spacing_mm, sureness=sureness).problems)


def test_the_true_liver_passes(torso: Torso) -> None:
    checked = check(torso.hu, torso.liver, torso.spacing_mm, sureness=0.9)
    assert checked.problems == ()
    assert checked.whole
    assert checked.millilitres == pytest.approx(torso.liver.sum() * 0.064)


def test_a_part_of_a_liver_may_be_small(torso: Torso) -> None:
    part = torso.planes(38, 41)
    checked = check(part.hu, part.liver, part.spacing_mm)
    assert checked.problems == ()
    assert not checked.whole


def test_a_stomach_is_on_the_left(torso: Torso) -> None:
    assert "on the patient's left" in problems_of(torso, torso.organs["stomach"])


def test_a_kidney_is_too_small(torso: Torso) -> None:
    said = problems_of(torso, torso.organs["right kidney"])
    assert "mL, expected 400 to 3500 mL for a liver" in said


def test_a_heart_is_above_the_lung_centre(torso: Torso) -> None:
    moved = np.roll(torso.organs["heart"], (-18, 0, 6), (0, 1, 2))
    assert "above the centre of the right lung" in problems_of(torso, moved)


def test_lung_has_other_values(torso: Torso) -> None:
    assert "HU, expected" in problems_of(torso, torso.hu < -700)


def test_two_pieces(torso: Torso) -> None:
    mask = torso.liver.copy()
    mask[:, :, 36:40] = False
    assert "its largest piece is" in problems_of(torso, mask)


def test_an_unsure_method(torso: Torso) -> None:
    assert "not sure of it (0.30" in problems_of(torso, torso.liver, sureness=0.3)


def test_an_empty_mask(torso: Torso) -> None:
    assert "its volume is 0 mL" in problems_of(torso, np.zeros_like(torso.liver))


MASK = Path("liver.nii.gz")


def volume(torso: Torso, hu: NDArray[np.floating] | None = None) -> Volume:
    return Volume((torso.hu if hu is None else hu).astype(np.float32), torso.geometry)


def test_the_right_mask_passes_without_a_word(torso: Torso) -> None:
    for hu in (torso.hu, torso.hu.clip(-200, 250)):
        assert check_given(volume(torso, hu), torso.liver, MASK) == []


def test_noise_and_a_rough_border_change_nothing(torso: Torso) -> None:
    noise = np.random.default_rng(1).normal(0, 40, torso.hu.shape)
    grown = ndimage.binary_dilation(torso.liver) & (torso.hu < 300)
    assert np.mean((torso.hu + noise)[torso.liver] < -30) < 0.02
    for mask in (torso.liver, grown):
        assert check_given(volume(torso, torso.hu + noise), mask, MASK) == []


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flipped_or_shifted_mask_is_refused(torso: Torso, axis: int) -> None:
    for wrong in (np.flip(torso.liver, axis), np.roll(torso.liver, 15, axis)):
        with pytest.raises(InputError, match=r"not on the liver: [0-9.]+ % of its inside is air, fat or bone"):
            check_given(volume(torso), wrong, MASK)


def test_a_body_mask_is_refused(torso: Torso) -> None:
    with pytest.raises(InputError, match="not on the liver"):
        check_given(volume(torso), torso.hu > -300, MASK)


def test_another_organ_is_named_by_its_place_or_volume(torso: Torso) -> None:
    spleen = torso.organs["spleen"] & (torso.hu > -50)
    [warning] = check_given(volume(torso), spleen, MASK)
    assert "its centre is on the patient's left" in warning
    small = torso.liver.copy()
    middle = int(np.argwhere(torso.liver)[:, 2].mean())
    small[:, :, : middle - 2] = small[:, :, middle + 2 :] = False
    [warning] = check_given(volume(torso), small, MASK)
    assert "mL, expected 300 to 6000 mL for a liver" in warning


def test_a_cut_liver_is_named(torso: Torso) -> None:
    part = torso.planes(30, 45)
    [warning] = check_given(volume(part), part.liver, MASK)
    assert "cut by the field of view" in warning


def test_a_mask_of_a_few_voxels_is_judged_too(torso: Torso) -> None:
    x, y, z = (int(index) for index in np.argwhere(torso.liver).mean(0))
    one = np.zeros_like(torso.liver)
    one[x, y, z] = True
    [warning] = check_given(volume(torso), one, MASK)
    assert "mL, expected 300 to 6000 mL" in warning
    air = np.zeros_like(torso.liver)
    air[tuple(np.argwhere(torso.hu < -900)[0])] = True
    with pytest.raises(InputError, match=r"not on the liver: 100\.0 %"):
        check_given(volume(torso), air, MASK)
