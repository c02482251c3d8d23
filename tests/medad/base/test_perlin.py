"""Comparison of Perlin noise with the same formula written per pixel in plain Python."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from medad.base.noise import PerlinLattice, draw_lattice, fade, perlin_masks, perlin_noise
from tests.seeded import generators

CPU = torch.device("cpu")
DRAEM = {"scale_exponents": (0, 5), "rotation_deg": (-90.0, 90.0)}


def _noise_at(v: float, u: float, angles: list[list[float]]) -> float:
    """Return K. Perlin's "Improving noise" (2002) in two dimensions: ramps of four corners, weighted by the blend."""
    rows, columns = len(angles) - 1, len(angles[0]) - 1
    if not (0 <= v <= rows and 0 <= u <= columns):
        return 0.0
    total = 0.0
    top, left = min(int(v), rows - 1), min(int(u), columns - 1)
    for j in (top, top + 1):
        for i in (left, left + 1):
            weight = math.sin(angles[j][i]) * (v - j) + math.cos(angles[j][i]) * (u - i)
            for distance in (abs(v - j), abs(u - i)):
                t = 1 - distance
                weight *= 6 * t**5 - 15 * t**4 + 10 * t**3
            total += weight
    return math.sqrt(2) * total


def _reference(lattice: PerlinLattice, image: int, height: int, width: int) -> torch.Tensor:
    ry, rx = lattice.cells[image].tolist()
    angles = lattice.angles_rad[image].double()[: ry + 1, : rx + 1].tolist()
    turn = lattice.rotation_rad[image].double().item()
    out = torch.empty(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            from_middle = complex(column + 0.5 - width / 2, row + 0.5 - height / 2)
            turned = from_middle * complex(math.cos(turn), math.sin(turn))
            v, u = (turned.imag + height / 2) / height * ry, (turned.real + width / 2) / width * rx
            out[row, column] = _noise_at(v, u, angles)
    return out


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 45)])
@pytest.mark.parametrize("rotation_deg", [(0.0, 0.0), (-90.0, 90.0)])
def test_noise_is_the_formula(height: int, width: int, rotation_deg: tuple[float, float]) -> None:
    lattice = draw_lattice(generators(*range(6)), scale_exponents=(0, 5), rotation_deg=rotation_deg)
    noise = perlin_noise(lattice, (height, width), CPU)
    for image, ours in enumerate(noise.double()):
        expected = _reference(lattice, image, height, width)
        # a rotated pixel exactly on the lattice's edge may be rounded to either side of it
        edge = (ours == 0) ^ (expected == 0)
        assert edge.sum() <= 2
        torch.testing.assert_close(ours[~edge], expected[~edge], atol=2e-5, rtol=0)


def test_masks_are_where_the_reference_exceeds_the_threshold() -> None:
    masks = perlin_masks(generators(*range(8)), (32, 32), device=CPU)
    lattice = draw_lattice(generators(*range(8)), **DRAEM)  # type: ignore[arg-type]
    for image, mask in enumerate(masks):
        expected = _reference(lattice, image, 32, 32)
        clear = (expected - 0.5).abs() > 1e-4
        assert torch.equal(mask[clear], (expected > 0.5)[clear])
    assert masks.any()


def test_noise_vanishes_at_lattice_points_and_outside_the_turned_lattice() -> None:
    lattice = draw_lattice(generators(0), scale_exponents=(1, 1), rotation_deg=(45.0, 45.0))
    # with an odd side a pixel's centre is the centre of the image, which is a lattice point of 2 x 2 cells
    noise = perlin_noise(lattice, (33, 33), CPU)[0]
    assert noise[16, 16] == 0
    assert (noise[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    assert (noise[16, 1:16] != 0).all()


def test_a_whole_turn_changes_nothing_and_a_half_turn_mirrors_both_axes() -> None:
    plain, whole, half = (
        perlin_noise(draw_lattice(generators(3), scale_exponents=(2, 4), rotation_deg=(turn, turn)), (24, 40), CPU)
        for turn in (0.0, 360.0, 180.0)
    )
    inner = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(whole[inner], plain[inner], atol=1e-4, rtol=0)
    torch.testing.assert_close(half[inner], plain.flip(1, 2)[inner], atol=1e-4, rtol=0)


def test_an_image_s_mask_is_its_generators_own() -> None:
    together = perlin_masks(generators(*range(7)), (48, 64), device=CPU)
    for seed in range(7):
        assert torch.equal(perlin_masks(generators(seed), (48, 64), device=CPU)[0], together[seed])


def test_scales_are_drawn_evenly_and_each_axis_by_itself() -> None:
    cells = draw_lattice(generators(*range(1800)), scale_exponents=(0, 5)).cells
    for axis in (0, 1):
        counts = Counter(cells[:, axis].tolist())
        assert sorted(counts) == [1, 2, 4, 8, 16, 32]
        # binomial distribution, 1800 draws at 1/6: mean 300, sd 16
        assert all(220 < count < 380 for count in counts.values())
    same = (cells[:, 0] == cells[:, 1]).float().mean()
    assert 0.1 < same < 0.24


def test_rotation_and_directions_fill_their_ranges() -> None:
    lattice = draw_lattice(generators(*range(400)), scale_exponents=(2, 2), rotation_deg=(-90.0, 90.0))
    degrees = lattice.rotation_rad.rad2deg()
    assert -90 <= degrees.min() < -85
    assert 85 < degrees.max() <= 90
    # the sum of n random unit vectors has a length of about sqrt(n)
    angles = lattice.angles_rad
    resultant = torch.complex(angles.cos().sum(), angles.sin().sum()).abs()
    assert resultant < 4 * math.sqrt(angles.numel())


def test_fade_is_flat_at_both_ends() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    blend = fade(t)
    assert blend.tolist() == [0.0, 0.5, 1.0]
    (slope,) = torch.autograd.grad(blend.sum(), t, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), t)
    for derivative in (slope, curvature):
        assert derivative[[0, 2]].tolist() == pytest.approx([0, 0])


def test_a_higher_threshold_never_grows_a_mask() -> None:
    low, high = (perlin_masks(generators(*range(9)), (64, 64), threshold=t, device=CPU) for t in (0.3, 0.6))
    assert (high <= low).all()
    assert low.sum() > high.sum()
