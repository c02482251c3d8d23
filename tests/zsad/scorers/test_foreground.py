"""Tests of the foreground and its components on masks with known results, and against a flood fill by pixel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from jaxtyping import Bool
from numpy import ndarray

from tests.flood import flood_fill
from zsad.scorers.segmentation.foreground import Component, covered_segments, find_components, scale_component

Mask = Bool[ndarray, "H W"]


def _box(top: int, left: int, bottom: int, right: int, shape: tuple[int, int] = (40, 60)) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def _same(ours: list[Mask], expected: list[Mask]) -> bool:
    return len(ours) == len(expected) and all((a == b).all() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("inside", "enough"), [(100, True), (81, True), (80, True), (79, False), (0, False)])
def test_a_segment_needs_80_percent_of_its_own_area_inside(inside: int, enough: bool) -> None:
    segment, dichotomous = _box(10, 10, 20, 20), np.zeros((40, 60), dtype=bool)
    dichotomous.ravel()[np.flatnonzero(segment)[:inside]] = True
    dichotomous[30:] = True  # the rest of the mask does not matter
    assert _same(covered_segments([segment], dichotomous, 0.8), [segment] if enough else [])


@pytest.mark.parametrize("covered", [0.1, 0.3, 0.6, 0.7, 0.8, 0.9])
def test_the_share_is_exact_at_every_area(covered: float) -> None:
    exact = Fraction(str(covered))
    row = np.arange(60)[None, :]
    for area in range(1, 60):
        for inside in range(area + 1):
            foreground_segments = covered_segments([row < area], row < inside, covered)
            assert bool(foreground_segments) == (inside >= exact * area)


def test_empty_segments_are_no_foreground() -> None:
    full = np.ones((40, 60), dtype=bool)
    assert covered_segments([np.zeros_like(full)], full, 0.8) == []


def test_a_shadow_is_left_out_and_the_object_stays() -> None:
    thing, shadow = _box(10, 10, 20, 30), _box(20, 10, 30, 30)
    dichotomous = _box(8, 8, 23, 32)  # includes 3 of the shadow's 10 rows
    assert find_components([shadow, thing], dichotomous, 0.8) == (Component(10, 10, 20, 30, parts=1),)


def test_boxes_and_parts_of_two_instances() -> None:
    segments = [
        _box(2, 3, 12, 13),
        _box(4, 5, 6, 7),  # a detail of the first segment
        _box(8, 10, 10, 18),  # extends beyond its side
        _box(30, 40, 38, 50),
        _box(20, 0, 22, 60),  # outside the salient mask
    ]
    dichotomous = _box(0, 0, 15, 20) | _box(28, 35, 40, 60)
    expected = (Component(2, 3, 12, 18, parts=3), Component(30, 40, 38, 50, parts=1))
    assert find_components(segments, dichotomous, 0.8) == expected
    assert find_components(segments[::-1], dichotomous, 0.8) == expected


def test_a_segment_in_two_pieces_is_a_part_of_both() -> None:
    full = np.ones((40, 60), dtype=bool)
    first, second = _box(1, 1, 5, 5), _box(20, 20, 25, 25)
    found = find_components([first | second, second], full, 0.8)
    assert found == (Component(1, 1, 5, 5, parts=1), Component(20, 20, 25, 25, parts=2))


def test_corners_connect() -> None:
    full = np.ones((40, 60), dtype=bool)
    assert find_components([_box(0, 0, 4, 4), _box(4, 4, 8, 8)], full, 0.8) == (Component(0, 0, 8, 8, parts=2),)
    assert len(find_components([_box(0, 0, 4, 4), _box(5, 4, 8, 8)], full, 0.8)) == 2


@pytest.mark.parametrize("segments", [[], [_box(0, 0, 10, 10)]], ids=["no segment", "none inside"])
def test_without_foreground_the_image_is_one_component_without_parts(segments: list[Mask]) -> None:
    assert find_components(segments, _box(30, 30, 35, 35), 0.8) == (Component(0, 0, 40, 60, parts=0),)


@pytest.mark.parametrize("seed", range(8))
def test_components_are_those_of_a_flood_fill(seed: int) -> None:
    rng = np.random.default_rng(seed)
    segments = [rng.random((14, 17)) < 0.07 for _ in range(6)]
    # the first segment is always in the foreground, the second never
    dichotomous = (rng.random((14, 17)) < 0.6) & ~segments[1] | segments[0]
    foreground_segments = [s for s in segments if 10 * int((s & dichotomous).sum()) >= 6 * int(s.sum())]
    expected = set()
    for pixels in flood_fill(np.any(foreground_segments, axis=0)):
        ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
        parts = sum(any(segment[y, x] for y, x in pixels) for segment in foreground_segments)
        expected.add(Component(min(ys), min(xs), max(ys) + 1, max(xs) + 1, parts))
    found = find_components(segments, dichotomous, 0.6)
    assert set(found) == expected
    assert len(found) == len(flood_fill(np.any(foreground_segments, axis=0)))


def test_a_box_on_a_larger_image() -> None:
    assert scale_component(Component(1, 2, 3, 5, 7), (4, 6), (8, 18)) == Component(2, 6, 6, 15, 7)
    # a pixel of 10/3 px also touches the pixels on both sides
    assert scale_component(Component(1, 1, 2, 2, 0), (3, 3), (10, 10)) == Component(3, 3, 7, 7, 0)
    assert scale_component(Component(1, 2, 3, 5, 7), (4, 6), (4, 6)) == Component(1, 2, 3, 5, 7)
    assert scale_component(Component(0, 0, 31, 47, 1), (31, 47), (1000, 1501)) == Component(0, 0, 1000, 1501, 1)
