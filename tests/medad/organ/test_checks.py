"""Each check of a liver mask, on a torso by construction."""

from __future__ import annotations

import numpy as np
import pytest

from medad.organ.checks import check
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
