"""Tests of tiles and of merging.

Tiles are compared with values computed by hand and with the rules of the segmentation-model paper. Merging is
compared with loops over pixels.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsad.scorers.segmentation.foreground import Component
from zsad.scorers.segmentation.tiles import Tile, cut_tile, harmonic_mean, mean_of_highest, merge_tiles, place_tiles


def _tiles(component: Component, image_hw: tuple[int, int], min_side_px: int = 352) -> tuple[Tile, ...]:
    return place_tiles(component, image_hw, min_side_px=min_side_px, long_aspect=1.5, many_parts=20)


def test_a_square_centred_on_the_component_with_its_larger_extent() -> None:
    assert _tiles(Component(300, 200, 700, 800, 3), (1000, 1500)) == (Tile(200, 200, 600),)


def test_a_small_component_has_a_tile_of_352_px() -> None:
    assert _tiles(Component(500, 700, 510, 730, 3), (1000, 1500)) == (Tile(505 - 176, 715 - 176, 352),)
    assert _tiles(Component(400, 400, 752, 752, 3), (1000, 1500)) == (Tile(400, 400, 352),)
    assert _tiles(Component(400, 400, 753, 753, 3), (1000, 1500)) == (Tile(400, 400, 353),)


@pytest.mark.parametrize(
    ("component", "top", "left"),
    [
        (Component(0, 0, 20, 20, 1), 0, 0),
        (Component(980, 0, 1000, 20, 1), 648, 0),
        (Component(0, 1480, 20, 1500, 1), 0, 1148),
        (Component(980, 1480, 1000, 1500, 1), 648, 1148),
    ],
)
def test_at_a_border_the_tile_is_moved_inside(component: Component, top: int, left: int) -> None:
    assert _tiles(component, (1000, 1500)) == (Tile(top, left, 352),)


def test_a_tile_larger_than_the_image_covers_all_of_it() -> None:
    # a tile of 352 px around (90, 180) would miss the last rows: 90 - 176 + 352 = 266 < 300
    assert _tiles(Component(80, 170, 100, 190, 1), (300, 500)) == (Tile(-52, 4, 352),)
    # the whole image is one component, so its tile is centred
    assert _tiles(Component(0, 0, 200, 300, 0), (200, 300)) == (Tile(-76, -26, 352),)


@pytest.mark.parametrize(("width", "parts", "many"), [(600, 21, False), (601, 21, True), (601, 20, False)])
def test_only_a_long_component_of_many_parts_is_tiled_along_its_length(width: int, parts: int, many: bool) -> None:
    tiles = _tiles(Component(500, 500, 900, 500 + width, parts), (2000, 2000))
    assert (len(tiles) > 1) == many
    assert {tile.side for tile in tiles} == {400 if many else width}


def test_tiles_along_the_length_in_steps_of_half_the_short_side() -> None:
    # 400 x 1400: the middle half of the first tile begins with the component, that of the last ends with it
    tiles = _tiles(Component(500, 300, 900, 1700, 21), (2000, 2000))
    assert tiles == tuple(Tile(500, left, 400) for left in (200, 400, 600, 800, 1000, 1200, 1400))


def test_the_last_step_may_be_shorter() -> None:
    tiles = _tiles(Component(500, 300, 900, 1650, 21), (2000, 2000))
    assert [tile.left for tile in tiles] == [200, 400, 600, 800, 1000, 1200, 1350]


def test_a_thin_component_has_tiles_of_352_px_in_steps_of_half_its_own_short_side() -> None:
    tiles = _tiles(Component(500, 300, 600, 800, 21), (2000, 2000))
    assert {(tile.top, tile.side) for tile in tiles} == {(550 - 176, 352)}
    # the first tile starts 88 px (a quarter of a tile) before the component, the last 264 px before its end
    assert [tile.left for tile in tiles] == [212, 262, 312, 362, 412, 462, 512, 536]


def test_a_component_shorter_than_half_a_tile_has_one() -> None:
    assert _tiles(Component(500, 300, 520, 400, 21), (2000, 2000)) == (Tile(510 - 176, 350 - 176, 352),)


def test_tiles_that_the_border_makes_equal_are_one() -> None:
    tiles = _tiles(Component(0, 0, 40, 400, 21), (352, 400))
    # the starts are -88, -68, ... 132, 136 before tiles are moved into 0..48
    assert [(tile.top, tile.left) for tile in tiles] == [(0, 0), (0, 12), (0, 32), (0, 48)]


boxes = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60), st.integers(1, 200))


@given(box=boxes, parts=st.integers(19, 23), min_side=st.integers(1, 50), more=st.tuples(*[st.integers(0, 90)] * 2))
def test_laws_of_tiles(box: tuple[int, int, int, int], parts: int, min_side: int, more: tuple[int, int]) -> None:
    top, left, height, width = box
    component = Component(top, left, top + height, left + width, parts)
    image_hw = (top + height + more[0], left + width + more[1])
    tiles = _tiles(component, image_hw, min_side)
    side_lengths = {tile.side for tile in tiles}
    assert len(side_lengths) == 1
    side = side_lengths.pop()
    assert side >= min_side
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        for start, length in ((tile.top, image_hw[0]), (tile.left, image_hw[1])):
            inside = start >= 0 and start + side <= length
            covers = start <= 0 and start + side >= length
            assert inside or covers
    across = [(tile.left, tile.left + side) for tile in tiles]
    if width > 1.5 * height and parts > 20:
        assert side == max(height, min_side)
        starts = [start for start, _ in across]
        assert starts == sorted(starts)
        assert all(b - a <= max(1, height // 2) for a, b in itertools.pairwise(starts))
        for x in range(left, left + width):
            middle = any(start + side // 4 <= x < stop - side // 4 for start, stop in across)
            at_border = x < side // 4 or x >= image_hw[1] - side // 4
            assert middle or at_border or image_hw[1] < side
            assert any(start <= x < stop for start, stop in across)
    elif not (height > 1.5 * width and parts > 20):
        assert side == max(height, width, min_side)
        assert len(tiles) == 1
        assert tiles[0].top <= top
        assert top + height <= tiles[0].top + side
        assert across[0][0] <= left
        assert left + width <= across[0][1]
    turned = _tiles(Component(left, top, left + width, top + height, parts), image_hw[::-1], min_side)
    assert turned == tuple(Tile(tile.left, tile.top, tile.side) for tile in tiles)


def test_cut_is_a_slice_inside_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert (cut_tile(image, Tile(3, 7, 20)) == image[3:23, 7:27]).all()


@pytest.mark.parametrize("tile", [Tile(-2, -3, 9), Tile(-14, 1, 21), Tile(-7, -8, 23)])
def test_over_a_border_the_image_is_mirrored(tile: Tile) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)

    def reflected(place: int, length: int) -> int:
        while not 0 <= place < length:
            place = -1 - place if place < 0 else 2 * length - 1 - place
        return place

    ours = cut_tile(image, tile)
    assert ours.shape == (tile.side, tile.side, 3)
    for y in range(tile.side):
        for x in range(tile.side):
            expected = image[reflected(tile.top + y, 5), reflected(tile.left + x, 6)]
            assert (ours[y, x] == expected).all()


def test_overlaps_are_averaged_and_the_rest_is_zero() -> None:
    merged = merge_tiles(
        [
            (Tile(0, 0, 2), np.full((2, 2), 0.25)),
            (Tile(0, 1, 2), np.full((2, 2), 0.75)),
            (Tile(1, 1, 2), np.ones((2, 2))),
        ],
        (4, 4),
    )
    expected: list[list[float]] = [[0.25, 0.5, 0.75, 0], [0.25, 2 / 3, 0.875, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert merged.dtype == np.float32
    assert np.allclose(merged, expected, atol=1e-7)
    assert (merge_tiles([], (3, 5)) == np.zeros((3, 5))).all()


@pytest.mark.parametrize("seed", range(4))
def test_merging_is_a_mean_over_the_tiles_of_each_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = [Tile(int(rng.integers(-6, 8)), int(rng.integers(-6, 11)), int(rng.integers(1, 14))) for _ in range(7)]
    maps = [rng.random((tile.side, tile.side), dtype=np.float32) for tile in tiles]
    merged = merge_tiles(zip(tiles, maps, strict=True), (9, 12))
    for y in range(9):
        for x in range(12):
            values = [
                float(values[y - tile.top, x - tile.left])
                for tile, values in zip(tiles, maps, strict=True)
                if tile.top <= y < tile.top + tile.side and tile.left <= x < tile.left + tile.side
            ]
            assert merged[y, x] == pytest.approx(sum(values) / len(values) if values else 0, abs=1e-6)


def test_harmonic_mean_is_its_definition() -> None:
    probabilities = torch.rand(19, 4, 5, generator=torch.Generator().manual_seed(1))
    ours = harmonic_mean(probabilities)
    for y in range(4):
        for x in range(5):
            total = 0.0
            for prompt in range(19):
                total += 1 / float(probabilities[prompt, y, x])
            assert ours[y, x].item() == pytest.approx(19 / total, rel=1e-5)
    assert (ours <= probabilities.mean(0)).all()


def test_one_prompt_that_sees_nothing_makes_the_harmonic_mean_zero() -> None:
    probabilities = torch.tensor([[[0.9, 0.3, 0.0]], [[0.0, 0.3, 0.0]]])
    assert harmonic_mean(probabilities)[0].tolist() == pytest.approx([0, 0.3, 0])


@pytest.mark.parametrize(
    ("scores", "share", "expected"),
    [
        ([0.1, 0.9, 0.3, 0.5, 0.2, 0.7, 0.4, 0.6], 0.25, 0.8),
        ([0.1, 0.9, 0.3, 0.5, 0.2, 0.7, 0.4], 0.25, 0.9),
        ([0.4], 0.25, 0.4),
        ([0.1, 0.9, 0.3], 0.25, 0.9),
        ([0.1, 0.9, 0.2], 1.0, 0.4),
        ([float(i) for i in range(100)], 0.29, 85.0),
    ],
)
def test_mean_of_the_highest(scores: list[float], share: float, expected: float) -> None:
    assert mean_of_highest(scores, share) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_a_quarter_is_rounded_down_to_one_at_least(scores: list[float]) -> None:
    count = max(1, len(scores) // 4)
    remaining, total = list(scores), 0.0
    for _ in range(count):
        total += remaining.pop(remaining.index(max(remaining)))
    assert math.isclose(mean_of_highest(scores, 0.25), total / count, abs_tol=1e-12)
