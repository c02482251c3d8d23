"""The checks of scans and of the values of masks: the right one passes, every wrong one is refused or named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.ct import checks, scale
from medad.ct.geometry import Geometry
from medad.ct.io import Labels, Volume
from tests.medad.organ.torso import Torso, make_torso

MASK, SCAN = Path("liver.nii.gz"), Path("scan.nii.gz")


@pytest.fixture(scope="module")
def torso() -> Torso:
    return make_torso()


def volume(torso: Torso, hu: NDArray[np.floating] | None = None) -> Volume:
    return Volume((torso.hu if hu is None else hu).astype(np.float32), torso.geometry)


def labels(torso: Torso, values: NDArray[np.integer]) -> Labels:
    return Labels(values, torso.geometry)


def test_the_right_scale_passes(torso: Torso) -> None:
    assert scale.check_hu(volume(torso), torso.liver, SCAN) == pytest.approx(105, abs=5)
    clipped = volume(torso, torso.hu.clip(-200, 250))
    assert scale.check_hu(clipped, torso.liver, SCAN) == pytest.approx(105, abs=5)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda hu: hu + 1024, r"median is .* look like HU \+ 1024"),
        (lambda hu: np.rint((hu.clip(-160, 240) + 160) * 255 / 400), "not HU|not plausible HU"),
        (lambda hu: np.where(hu < -300, 0, (hu.clip(-200, 200) + 250) * 0.5), "not HU|not plausible HU"),
        (lambda hu: (hu.clip(-1000, 1000) + 1000) / 2, "not plausible HU"),
        (lambda hu: (hu + 1000) / 4000, "not plausible HU"),
    ],
)
def test_images_that_are_not_hu_are_refused(torso: Torso, change: object, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        scale.check_hu(volume(torso, change(torso.hu)), torso.liver, SCAN)  # type: ignore[operator]


def test_a_tiny_scan_says_that_it_is_tiny(torso: Torso) -> None:
    part = tuple(slice(int(index) - 2, int(index) + 2) for index in np.argwhere(torso.liver).mean(0))
    tiny = Volume(torso.hu[part].astype(np.float32), Geometry((4, 4, 4), torso.geometry.affine))
    with pytest.raises(InputError, match="too small: 4 x 4 x 4 voxels"):
        scale.check_hu(tiny, np.ones((4, 4, 4), np.bool_), SCAN)


def test_a_map_with_several_values_needs_a_value_of_liver(torso: Torso) -> None:
    values = np.zeros(torso.hu.shape, np.uint8)
    values[torso.liver], values[torso.organs["spleen"]] = 5, 1
    with pytest.raises(InputError, match=r"several values \(5: \d+ mL, 1: \d+ mL\).*--liver-label 5 is the largest"):
        checks.require_liver(labels(torso, values), (), MASK)
    np.testing.assert_array_equal(checks.require_liver(labels(torso, values), (5,), MASK), torso.liver)
    one = torso.liver.astype(np.uint8)
    np.testing.assert_array_equal(checks.require_liver(labels(torso, one), (), MASK), torso.liver)
    with pytest.raises(InputError, match="its only value is 255; if it is liver, --liver-label 255"):
        checks.require_liver(labels(torso, one * 255), (), MASK)
    with pytest.raises(InputError, match="label without liver"):
        checks.require_liver(labels(torso, one * 0), (), MASK)


@pytest.mark.parametrize(("count", "wanted"), [(104, 5), (117, 5), (13, 6), (15, 6)])
def test_maps_of_known_programs_are_recognised(torso: Torso, count: int, wanted: int) -> None:
    values = np.zeros(torso.hu.size, np.uint8)
    values[: 2 * count] = np.repeat(np.arange(1, count + 1), 2)
    with pytest.raises(InputError, match=rf"looks like .*--liver-label {wanted}$"):
        checks.require_liver(labels(torso, values.reshape(torso.hu.shape)), (), MASK)


def test_a_tumour_left_out_is_named_or_filled(torso: Torso) -> None:
    inner = np.zeros_like(torso.liver)
    centre = [int(index) for index in np.argwhere(torso.liver).mean(0)]
    inner[tuple(slice(index - 2, index + 2) for index in centre)] = True
    assert (inner & torso.liver).sum() == inner.sum()
    millilitres = inner.sum() * torso.geometry.voxel_mm3 / 1000
    values = torso.liver.astype(np.uint8)
    values[inner] = 2
    lits = labels(torso, values)
    with pytest.raises(InputError, match=r"--liver-label 1 --liver-label 2 is the largest; 2 inside it"):
        checks.require_liver(lits, (), MASK)
    liver = checks.require_liver(lits, (1,), MASK)
    [warning] = checks.left_out_values(lits, liver, (1,))
    assert f"2: {millilitres:.1f} mL" in warning
    assert "--liver-label 1 --liver-label 2 takes them in" in warning
    assert checks.left_out_values(lits, torso.liver, (1, 2)) == []
    values[torso.organs["spleen"]] = 3
    assert len(checks.left_out_values(labels(torso, values), liver, (1, 2))) == 0, "an organ beside it is not inside"
    filled, [note] = checks.fill_cavities(liver, torso.geometry.voxel_mm3)
    np.testing.assert_array_equal(filled, torso.liver)
    assert f"{millilitres:.1f} mL" in note
    assert checks.fill_cavities(torso.liver, 1.0)[1] == []
