"""The built-in method on torsos by construction: it takes the liver and no other organ."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medad.organ import builtin
from medad.organ.checks import check
from medad.organ.refine import dice
from tests.medad.organ.torso import Torso, make_torso


@pytest.fixture(scope="module")
def torso() -> Torso:
    return make_torso()


def found_in(torso: Torso) -> builtin.Found:
    found = builtin.find(torso.hu, torso.spacing_mm)
    assert found is not None
    return found


def test_a_whole_torso(torso: Torso) -> None:
    found = found_in(torso)
    assert dice(found.mask, torso.liver) > 0.9
    for name in torso.organs.keys() - {"liver"}:
        assert (found.mask & torso.organs[name]).sum() < 0.03 * torso.organs[name].sum(), name
    checked = check(torso.hu, found.mask, torso.spacing_mm, sureness=found.sureness)
    assert checked.problems == ()
    assert checked.whole
    assert 0.8 < found.sureness <= 1


def test_eleven_thick_slices_without_lung() -> None:
    part = make_torso((2.0, 2.0, 5.0)).planes(20, 31)
    found = found_in(part)
    assert dice(found.mask, part.liver) > 0.9
    checked = check(part.hu, found.mask, part.spacing_mm, sureness=found.sureness)
    assert checked.problems == ()
    assert not checked.whole


@pytest.mark.parametrize("liver_hu", [60, 150])
def test_other_contrasts(liver_hu: float) -> None:
    torso = make_torso(liver_hu=liver_hu)
    assert dice(found_in(torso).mask, torso.liver) > 0.85


def test_a_dark_tumour_at_the_edge_stays(torso: Torso) -> None:
    x, y, z = np.indices(torso.hu.shape) * 4.0
    tumour = ((x - 75) ** 2 + (y - 95) ** 2 + (z - 150) ** 2 < 28**2) & torso.liver
    hu = torso.hu.copy()
    hu[tumour] -= 30
    found = builtin.find(hu, torso.spacing_mm)
    assert found is not None
    assert (found.mask & tumour).sum() > 0.9 * tumour.sum()


def test_a_fine_grid_gives_the_same_liver(torso: Torso) -> None:
    fine = Torso(np.repeat(torso.hu, 2, 0), {}, (2.0, 4.0, 4.0))
    assert dice(found_in(fine).mask[::2], found_in(torso).mask) > 0.97


@pytest.mark.parametrize("kind", ["air", "water", "noise"])
def test_no_liver_is_found_where_there_is_no_body(kind: str) -> None:
    rng = np.random.default_rng(0)
    hu = np.full((60, 50, 40), -1000, np.float32)
    if kind == "water":
        hu[10:50, 10:40] = 0
    if kind == "noise":
        hu += ndimage.gaussian_filter(rng.standard_normal(hu.shape), 2).astype(np.float32) * 4000
    found = builtin.find(hu, (4.0, 4.0, 4.0))
    assert found is None or check(hu, found.mask, (4.0, 4.0, 4.0), sureness=found.sureness).problems


def test_one_plane(torso: Torso) -> None:
    part = torso.planes(38, 39)
    found = builtin.find(part.hu, part.spacing_mm)
    assert found is None or found.mask.shape == part.hu.shape
