"""Masks and lesion tables against literal references, analytic shapes and laws of geometry."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from skimage.filters import threshold_otsu

from medad.base.boxes import bounding_box
from medad.config.liver import PostprocessSettings
from medad.evaluation.postprocess import label_lesions, lesion_table, postprocess, resolve_threshold
from tests.flood import flood_fill

Array = np.ndarray[Any, Any]
Voxel = tuple[int, int, int]

small_shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=5)
# few distinct values, so that probabilities often equal the threshold
coarse = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Array]:
    shape = draw(small_shapes)
    probability = draw(hnp.arrays(np.float32, shape, elements=coarse.map(float)))
    return probability, draw(hnp.arrays(bool, shape))


@st.composite
def affines(draw: st.DrawFn) -> Array:
    """Draw any rotation, reflection and spacing, sometimes with shear, as scanners and registrations write."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(rng.uniform(0.4, 5.0, 3))
    if draw(st.booleans()):
        affine[:3, :3] @= np.eye(3) + np.triu(rng.uniform(-0.3, 0.3, (3, 3)), 1)
    affine[:3, 3] = rng.uniform(-400, 400, 3)
    return affine


def longest_pair(voxels: set[tuple[int, ...]], affine: Array) -> float:
    points = [affine[:3, :3] @ np.array(voxel) for voxel in voxels]
    return max((float(np.linalg.norm(a - b)) for a, b in itertools.combinations(points, 2)), default=0.0)


@given(cases(), st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from([0.0, 1.0, 2.5, 6.0]))
def test_postprocess_is_threshold_liver_and_size(case: tuple[Array, Array], threshold: float, limit: float) -> None:
    probability, liver = case
    expected = np.zeros(probability.shape, dtype=bool)
    for component in flood_fill((probability >= threshold) & liver):
        if len(component) * 1.25 >= limit:
            for voxel in component:
                expected[voxel] = True
    got = postprocess(probability, liver, 1.25, PostprocessSettings(threshold=threshold, min_lesion_mm3=limit))
    np.testing.assert_array_equal(got, expected)


def test_lesion_of_exactly_the_limit_stays_despite_single_precision_affine() -> None:
    voxel_mm3 = float(np.float32(0.7) * np.float32(0.7) * np.float32(0.7))
    probability = np.zeros((9, 9, 9), dtype=np.float32)
    probability[:3, 0, 0] = 1.0
    probability[5:7, 5, 5] = 1.0
    limit = PostprocessSettings(min_lesion_mm3=3 * 0.7**3)
    mask = postprocess(probability, np.ones((9, 9, 9), dtype=bool), voxel_mm3, limit)
    assert mask[:3, 0, 0].all()
    assert np.count_nonzero(mask) == 3


def test_corner_neighbours_are_one_lesion() -> None:
    probability = np.zeros((4, 4, 4), dtype=np.float32)
    for step in range(4):
        probability[step, step, step] = 0.9
    liver = np.ones((4, 4, 4), dtype=bool)
    assert np.count_nonzero(postprocess(probability, liver, 1.0, PostprocessSettings(min_lesion_mm3=4.0))) == 4
    assert not postprocess(probability, liver, 1.0, PostprocessSettings(min_lesion_mm3=4.1)).any()


def test_nan_is_no_tumour() -> None:
    probability = np.full((3, 3, 3), np.nan, dtype=np.float32)
    assert not postprocess(probability, np.ones((3, 3, 3), dtype=bool), 1.0, PostprocessSettings()).any()


@pytest.mark.parametrize("voxel_mm3", [0.0, -1.0, math.nan, math.inf])
def test_nonsense_voxel_volume_is_refused(voxel_mm3: float) -> None:
    with pytest.raises(ValueError, match="voxel_mm3"):
        postprocess(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), bool), voxel_mm3, PostprocessSettings())


def test_shapes_must_agree() -> None:
    with pytest.raises(Exception, match=r"(?s)shape|X Y Z"):
        postprocess(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 3), bool), 1.0, PostprocessSettings())


def test_memory_follows_the_liver_not_the_volume() -> None:
    shape = (400, 200, 200)
    probability = np.zeros(shape, dtype=np.float32)
    liver = np.zeros(shape, dtype=bool)
    liver[180:220, 80:120, 80:120] = True
    probability[190:200, 90:100, 90:100] = 1.0
    volume, organ = probability.size, int(np.count_nonzero(liver))
    tracemalloc.start()
    try:
        mask = postprocess(probability, liver, 1.0, PostprocessSettings(min_lesion_mm3=10.0))
        lesion_table(mask, probability, np.eye(4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.count_nonzero(mask) == 1000
    # the mask is one byte per voxel, and so is at most the workspace of any() in bounding_box
    assert peak < 1.1 * volume + 30 * organ


@given(hnp.arrays(bool, small_shapes))
def test_bounding_box_holds_all_and_is_tight(mask: Array) -> None:
    box = bounding_box(mask)
    if box is None:
        assert not mask.any()
        return
    assert np.count_nonzero(mask[box]) == np.count_nonzero(mask)
    for axis in range(3):
        inside = np.moveaxis(mask[box], axis, 0)
        assert inside[0].any()
        assert inside[-1].any()


@given(cases(), affines())
def test_lesion_table_against_literal_reference(case: tuple[Array, Array], affine: Array) -> None:
    probability, mask = case
    expected = []
    for component in flood_fill(mask):
        points = np.array([affine[:3, :3] @ voxel + affine[:3, 3] for voxel in component])
        scores = [float(probability[voxel]) for voxel in component]
        volume = len(component) * abs(np.linalg.det(affine[:3, :3]))
        row = (volume, longest_pair(component, affine), *points.mean(axis=0), sum(scores) / len(scores), max(scores))
        expected.append(row)
    lesions = lesion_table(mask, probability, affine)
    got = [
        (one.volume_mm3, one.diameter_mm, *one.centroid_ras_mm, one.mean_probability, one.max_probability)
        for one in lesions
    ]
    assert [one.id for one in lesions] == list(range(1, len(expected) + 1))
    assert all(a.volume_mm3 >= b.volume_mm3 for a, b in itertools.pairwise(lesions))
    # equal volumes may have any order in the reference's set
    unmatched = list(expected)
    for row in got:
        match = [other for other in unmatched if np.allclose(row, other, rtol=1e-9, atol=1e-7)]
        assert match, f"{row} is not in {unmatched}"
        unmatched.remove(match[0])
    assert not unmatched


@pytest.mark.parametrize(
    ("lengths", "diagonal"),
    [((400, 1, 1), 399.0), ((1, 400, 1), 399.0), ((1, 1, 400), 399.0), ((30, 40, 1), math.hypot(29, 39))],
    ids=["line x", "line y", "line z", "plane"],
)
def test_straight_and_flat_lesions(lengths: Voxel, diagonal: float) -> None:
    mask = np.ones(lengths, dtype=bool)
    (lesion,) = lesion_table(mask, mask.astype(np.float32), np.eye(4))
    assert lesion.diameter_mm == pytest.approx(diagonal, rel=1e-12)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_tilted_planes_and_diagonal_lines(axes: tuple[int, int, int]) -> None:
    plane = np.zeros((60, 60, 60), dtype=bool)
    i, j = np.mgrid[:60, :60]
    plane[i, j, i] = True
    (lesion,) = lesion_table(plane.transpose(axes), plane.transpose(axes).astype(np.float32), np.eye(4))
    assert lesion.diameter_mm == pytest.approx(59 * math.sqrt(3), rel=1e-12)
    line = np.zeros((300, 300, 3), dtype=bool)
    line[np.arange(300), np.arange(300), 1] = True
    (lesion,) = lesion_table(line.transpose(axes), line.transpose(axes).astype(np.float32), np.eye(4))
    assert lesion.diameter_mm == pytest.approx(299 * math.sqrt(2), rel=1e-12)


@settings(max_examples=5)
@given(affines(), st.integers(0, 2**32))
def test_hull_finds_the_farthest_pair_of_a_large_ragged_lesion(affine: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    semi = rng.uniform(5, 9, 3)
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"), axis=-1) - 9.5
    mask = ((grid / semi) ** 2).sum(axis=-1) <= 1 + rng.normal(0, 0.15, (20, 20, 20))
    largest = max(flood_fill(mask), key=len)
    points = np.array(sorted(largest)) @ affine[:3, :3].T
    # the farthest pair by comparing all, one row at a time
    farthest = max(float(np.linalg.norm(points - point, axis=1).max()) for point in points)
    lesion = lesion_table(mask, mask.astype(np.float32), affine)[0]
    assert lesion.diameter_mm == pytest.approx(farthest, rel=1e-9)


def test_ball_of_known_size() -> None:
    spacing = np.array([0.8, 0.8, 2.5])
    radius = 15.0
    axes = [np.arange(-25, 26) * 0.8, np.arange(-25, 26) * 0.8, np.arange(-9, 10) * 2.5]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    mask = x**2 + y**2 + z**2 <= radius**2
    affine = np.diag([-0.8, -0.8, 2.5, 1.0])
    affine[:3, 3] = [120.0, 80.0, -300.0]
    (lesion,) = lesion_table(mask, mask.astype(np.float32) * np.float32(0.75), affine)
    assert lesion.volume_mm3 == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)
    assert 2 * radius - float(np.linalg.norm(spacing)) <= lesion.diameter_mm <= 2 * radius
    np.testing.assert_allclose(lesion.centroid_ras_mm, affine @ [25, 25, 9, 1] @ np.eye(4, 3), atol=1e-9)
    assert (lesion.mean_probability, lesion.max_probability) == (0.75, 0.75)


def test_no_lesion_gives_an_empty_table() -> None:
    assert lesion_table(np.zeros((3, 3, 3), bool), np.zeros((3, 3, 3), np.float32), np.eye(4)) == []


def test_lesion_fields_are_plain_numbers_under_stable_names() -> None:
    mask = np.ones((2, 1, 1), dtype=bool)
    (lesion,) = lesion_table(mask, mask.astype(np.float32), np.eye(4))
    assert json.loads(json.dumps(dataclasses.asdict(lesion))) == {
        "id": 1,
        "volume_mm3": 2.0,
        "diameter_mm": 1.0,
        "centroid_ras_mm": [0.5, 0.0, 0.0],
        "mean_probability": 1.0,
        "max_probability": 1.0,
        "mean_hu": None,
    }


def test_mean_hu_belongs_to_its_lesion_whatever_the_memory_order() -> None:
    mask = np.zeros((9, 8, 7), dtype=bool)
    mask[0, :2, 3] = True  # first in index order, and the smaller lesion
    mask[4:8, 5, 2:4] = True
    hu = np.zeros(mask.shape)
    hu[0, :2, 3] = 40.0, 43.0
    hu[4:8, 5, 2:4] = -7.0
    for order in (np.ascontiguousarray, np.asfortranarray):
        voxels = order(mask)
        table = lesion_table(voxels, voxels.astype(np.float32), np.eye(4), order(hu)[voxels].astype(np.float16))
        assert [(one.volume_mm3, one.mean_hu) for one in table] == [(8.0, -7.0), (2.0, 41.5)]
    box, labels = label_lesions(mask) or pytest.fail("there are lesions")
    assert labels[tuple(np.array([0, 0, 3]) - [part.start for part in box])] == 2


def test_the_automatic_threshold_parts_two_kinds_of_voxels_and_spares_a_healthy_liver() -> None:
    rng = np.random.default_rng(0)
    liver = np.ones((20, 20, 10), bool)
    liver[:2] = False
    probability = rng.normal(0.1, 0.02, liver.shape).astype(np.float32)
    healthy = probability.copy()
    probability[5:9, 5:9, 2:6] = 0.6
    probability[:2] = 0.9
    settings = PostprocessSettings(threshold="auto")
    assert 0.35 <= resolve_threshold(probability, liver, settings) < 0.5
    np.testing.assert_array_equal(postprocess(probability, liver, 1.0, settings), (probability == 0.6) & liver)
    assert resolve_threshold(healthy, liver, settings) == 0.35, "never below the range"
    assert not postprocess(healthy, liver, 1.0, settings).any()
    assert resolve_threshold(np.full_like(healthy, 0.3), liver, settings) == 0.5, "one value: nothing to separate"
    assert resolve_threshold(probability, np.zeros_like(liver), settings) == 0.5
    assert resolve_threshold(probability, liver, PostprocessSettings(threshold=0.7)) == 0.7


def test_an_automatic_range_that_does_not_rise_is_refused() -> None:
    with pytest.raises(ValidationError, match="auto_range"):
        PostprocessSettings(auto_range=(0.5, 0.25))


def test_the_automatic_threshold_ends_the_healthy_peak_where_tumour_is_a_small_part() -> None:
    """A broad healthy peak overlaps with a tumour of 1.6 %, as in network outputs. Otsu's method halves the peak."""
    rng = np.random.default_rng(0)
    liver = np.ones((50, 50, 20), bool)
    probability = np.abs(rng.normal(0.13, 0.085, liver.shape)).astype(np.float32)
    tumour = np.zeros_like(liver)
    tumour[5:15, 5:15, 4:12] = True
    probability[tumour] = np.clip(rng.normal(0.47, 0.15, int(tumour.sum())), 0, 1)

    def dice(threshold: float) -> float:
        mask = probability >= threshold
        return float(2 * (mask & tumour).sum() / (mask.sum() + tumour.sum()))

    best = max(dice(threshold) for threshold in np.arange(0.05, 0.95, 0.01))
    settings = PostprocessSettings(threshold="auto", auto_range=(0.05, 0.95))
    assert dice(resolve_threshold(probability, liver, settings)) > best - 0.05
    assert dice(threshold_otsu(probability)) < 0.1
