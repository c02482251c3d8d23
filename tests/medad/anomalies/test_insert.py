"""Lesions at the rim, mixed lesions and lesions without room, checked by their rules."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from medad.anomalies.insert import draw_diameters, insert_lesions, insert_sizes
from medad.base.errors import InputError
from medad.config.liver import InsertSettings

MM = (1.0, 1.0, 1.5)


def ball(shape: tuple[int, int, int] = (80, 80, 50), radius_mm: float = 33.0) -> NDArray[np.bool_]:
    axes = [(np.arange(n) - n // 2) * s for n, s in zip(shape, MM, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    inside: NDArray[np.bool_] = np.sqrt(x**2 + y**2 + z**2) <= radius_mm
    return inside


def flat(liver: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(liver, np.float32(100), np.float32(-80))


def sphere(shape: tuple[int, ...], centre: tuple[int, int, int], radius_mm: float) -> NDArray[np.bool_]:
    away = (np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))) * np.reshape(MM, (3, 1, 1, 1))
    inside: NDArray[np.bool_] = np.linalg.norm(away, axis=0) <= radius_mm
    return inside


@pytest.mark.parametrize("seed", range(5))
def test_a_lesion_at_the_rim_crosses_the_surface_and_counts_inside_alone(seed: int) -> None:
    liver = ball()
    hu = flat(liver)
    wanted = InsertSettings(place="rim", contrast_hu=(-50, -40))
    inserted = insert_sizes(hu, liver, MM, [20.0, 14.0, 8.0], wanted, np.random.default_rng(seed))
    assert len(inserted.lesions) == 3
    assert not inserted.number[~liver].any()
    np.testing.assert_array_equal(inserted.hu[~liver], hu[~liver])
    for count, lesion in enumerate(inserted.lesions, start=1):
        own = inserted.number == count
        assert own[lesion.centre_voxel]
        assert lesion.volume_mm3 == pytest.approx(np.count_nonzero(own) * np.prod(MM))
        around = sphere(liver.shape, lesion.centre_voxel, lesion.diameter_mm / 2)
        assert (own <= around).all()
        # true for every orientation: the sphere within the ellipsoid reaches a voxel outside the liver
        assert (sphere(liver.shape, lesion.centre_voxel, lesion.diameter_mm / 2 * 0.7) & ~liver).any()
        assert np.count_nonzero(around & liver) * np.prod(MM) >= 0.4 * 4 / 3 * np.pi * (lesion.diameter_mm / 2) ** 3
    centres = [np.array(lesion.centre_voxel) * MM for lesion in inserted.lesions]
    radii = [lesion.diameter_mm / 2 for lesion in inserted.lesions]
    for a in range(3):
        for b in range(a):
            assert np.linalg.norm(centres[a] - centres[b]) > radii[a] + radii[b]


def test_where_the_scan_ends_is_no_rim() -> None:
    """Insert into a liver that fills all planes except one: only there it has a surface."""
    liver = np.ones((40, 40, 30), dtype=np.bool_)
    liver[0] = False
    wanted = InsertSettings(place="rim", edge_mm=0)
    for seed in range(10):
        (lesion,) = insert_sizes(flat(liver), liver, MM, [12.0], wanted, np.random.default_rng(seed)).lesions
        assert lesion.centre_voxel[0] <= 0.7 * 6
    with pytest.raises(InputError, match="no room at the rim for 1 lesion of 12 to 12 mm"):
        insert_sizes(flat(liver), np.ones_like(liver), MM, [12.0], wanted, np.random.default_rng(0))


@pytest.mark.parametrize("contrast", [(-60.0, -50.0), (50.0, 60.0)])
@pytest.mark.parametrize("place", ["inside", "rim"])
def test_a_mixed_lesion_has_both_signs_the_contrast_in_its_core(contrast: tuple[float, float], place: str) -> None:
    liver = ball()
    wanted = InsertSettings.model_validate({"kind": "mixed", "place": place, "contrast_hu": contrast})
    inserted = insert_sizes(flat(liver), liver, MM, [24.0, 16.0], wanted, np.random.default_rng(1))
    change = inserted.hu - flat(liver)
    for count, lesion in enumerate(inserted.lesions, start=1):
        own = change[inserted.number == count]
        assert change[lesion.centre_voxel] == pytest.approx(lesion.contrast_hu, abs=0.02 * abs(lesion.contrast_hu))
        sign = np.sign(lesion.contrast_hu)
        core, rim = np.mean(own * sign > 5), np.mean(own * sign < -5)
        assert core > 0.15
        assert rim > 0.15
        assert np.abs(own).max() <= abs(lesion.contrast_hu) * (1 + 1e-5)
    assert not change[~liver].any()


def test_contrast_and_kind_change_neither_place_nor_shape() -> None:
    liver = ball()
    kinds = [{"contrast_hu": (-60, -50)}, {"contrast_hu": (15, 30)}, {"contrast_hu": (-60, -30), "kind": "mixed"}]
    numbers = [
        insert_sizes(flat(liver), liver, MM, [20.0, 9.0], InsertSettings.model_validate(kind), np.random.default_rng(4))
        for kind in kinds
    ]
    for other in numbers[1:]:
        np.testing.assert_array_equal(other.number, numbers[0].number)


@pytest.mark.parametrize("kind", ["uniform", "mixed"])
@pytest.mark.parametrize("place", ["inside", "rim"])
def test_one_generator_one_result(kind: str, place: str) -> None:
    liver = ball()
    wanted = InsertSettings.model_validate({"kind": kind, "place": place, "diameter_mm": (6, 12)})
    first, second, other = (insert_lesions(flat(liver), liver, MM, wanted, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert first[2] == second[2] != other[2]


def test_fewer_are_inserted_where_not_all_fit_and_an_error_says_so_otherwise() -> None:
    """Insert into a ball of radius 33 mm: one lesion of 40 mm fits, one of 70 mm or two of 40 mm do not."""
    liver = ball()

    def sizes(*diameters: float) -> list[float]:
        wanted = InsertSettings(fit="fewer")
        inserted = insert_sizes(flat(liver), liver, MM, diameters, wanted, np.random.default_rng(0))
        return [lesion.diameter_mm for lesion in inserted.lesions]

    assert sizes(70.0) == []
    assert sizes(70.0, 40.0, 8.0) == [40.0, 8.0]
    assert sizes(40.0, 40.0) == [40.0]
    assert sizes(20.0, 10.0) == [20.0, 10.0]
    with pytest.raises(InputError, match="no room for 2 lesions of 40 to 70 mm"):
        insert_sizes(flat(liver), liver, MM, [70.0, 40.0], InsertSettings(), np.random.default_rng(0))


def test_log_uniform_sizes_have_uniform_logarithms() -> None:
    wanted = InsertSettings(diameter_mm=(5, 60), diameter_distribution="log_uniform")
    drawn = draw_diameters(wanted, 20_000, np.random.default_rng(0))
    assert drawn.min() >= 5
    assert drawn.max() <= 60
    share = np.log(drawn / 5) / np.log(12)
    # the Kolmogorov distance of 20,000 uniform numbers exceeds 0.0138 once in a thousand times
    assert np.abs(np.sort(share) - np.linspace(0, 1, len(share))).max() < 0.0138
