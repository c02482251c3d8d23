"""Fat and vessels beside a liver by construction: they are left out, lesions inside the liver are not."""

from __future__ import annotations

import numpy as np

from medad.organ.exclusion import not_liver, without
from medad.organ.refine import refine
from tests.medad.organ.test_refine import PLACES, SPACING_MM, ball, scene

LIVER_HU = 105.0


def tube(x: float, y: float, radius: float) -> np.ndarray:
    """Return a vessel along z."""
    inside: np.ndarray = (PLACES[0] - x) ** 2 + (PLACES[1] - y) ** 2 < radius**2
    return inside


def smooth_liver() -> tuple[np.ndarray, np.ndarray]:
    """Return HU of a ball of liver in muscle, and the liver."""
    liver = ball((0, 0, 0), 45)
    return np.where(liver, LIVER_HU, 50).astype(np.float32), liver


def test_a_vessel_that_passes_the_liver_is_left_out() -> None:
    hu, liver = smooth_liver()
    vessel = tube(0, 30, 10)
    hu[vessel] = 170
    out = not_liver(liver, hu, LIVER_HU, SPACING_MM)
    assert out[vessel & (np.abs(PLACES[2]) < 60)].mean() > 0.99
    assert not out[liver & ~tube(0, 30, 12)].any()


def test_bright_lesions_and_small_vessels_of_the_liver_stay() -> None:
    hu, liver = smooth_liver()
    lesion, branch = ball((20, 0, 0), 14), tube(-20, 0, 2.5) & liver
    hu[lesion | branch] = 170
    assert not not_liver(liver, hu, LIVER_HU, SPACING_MM).any()


def test_fat_of_a_fissure_is_left_out_and_small_or_dark_lesions_are_not() -> None:
    hu, liver = smooth_liver()
    fissure = (np.abs(PLACES[0]) < 5) & (PLACES[1] > 10)
    lesion, drop = ball((-25, 0, 0), 12), ball((25, 0, 0), 3)
    hu[fissure], hu[lesion], hu[drop] = -90, 0, -60
    out = not_liver(liver, hu, LIVER_HU, SPACING_MM)
    assert out[fissure].all()
    assert not out[liver & (lesion | drop)].any()
    assert (out & ~fissure)[liver].sum() == 0


def test_refinement_leaves_fissure_and_vessel_out() -> None:
    hu, liver, logit = scene()
    vessel, fissure = tube(0, 30, 10), (np.abs(PLACES[0]) < 5) & (PLACES[1] < -10)
    hu[vessel & ~fissure], hu[fissure] = 170, -90
    refined = refine(hu, logit, SPACING_MM)
    assert refined is not None
    found = refined.field > 0
    assert not found[vessel & liver & (np.hypot(PLACES[0], PLACES[1] - 30) < 7)].any()
    assert not found[fissure & liver & (np.abs(PLACES[0]) < 3)].any()


def test_only_the_named_tissue_is_excluded_on_any_grid() -> None:
    hu, liver = smooth_liver()
    vessel, fissure = tube(0, 38, 10), (np.abs(PLACES[0]) < 5) & (PLACES[1] < -10)
    hu[vessel], hu[fissure] = 170, -90
    fine, inside = (values.repeat(3, 0).repeat(3, 1) for values in (hu, liver))
    spacing_mm = (SPACING_MM[0] / 3, SPACING_MM[1] / 3, SPACING_MM[2])
    for tissue, place, other in (("vessels", vessel, fissure), ("fat", fissure, vessel)):
        left = without([tissue], fine, inside, spacing_mm)[1::3, 1::3]
        assert left[place & liver].mean() < 0.05
        assert left[liver & other].all()
        assert not (left & ~liver).any()
    assert without([], fine, inside, spacing_mm) is inside
