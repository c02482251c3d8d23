"""Tests of metrics against scikit-learn, exact fractions and the literature's loop, on inputs with many ties.

There are also tests of properties and of known cases.
"""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from skimage import measure
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from tests.flood import flood_fill
from zsad.evaluation import curves
from zsad.evaluation.metric_rows import METRICS, definitions
from zsad.evaluation.metrics import (
    CHUNK_PIXELS,
    COUNTING_THREADS,
    Maps,
    PixelCurves,
    image_metrics,
    pixel_curves,
    pixel_metrics,
)

Array = NDArray[Any]
Pairs = list[tuple[Array, Array]]

# values outside 0..1, negative, huge, and neighbours that a clamp, a sigmoid or a cast to half would make equal
VALUES = [-1e30, -3.0, -0.0, 0.0, 1e-30, 0.25, 0.5, float(np.nextafter(np.float32(0.5), np.float32(1))), 1.0, 7.0, 1e6]
few_values = st.sampled_from([float(np.float32(value)) for value in VALUES])


@st.composite
def scored(draw: st.DrawFn) -> tuple[Array, Array]:
    """Draw image scores of both classes, with ties."""
    n = draw(st.integers(2, 30))
    labels = draw(hnp.arrays(bool, n).filter(lambda y: 0 < y.sum() < y.size))
    return draw(hnp.arrays(np.float64, n, elements=few_values)), labels


@st.composite
def map_sets(draw: st.DrawFn, dtype: Any = np.float32, elements: st.SearchStrategy[float] = few_values) -> Pairs:
    """Draw maps of several sizes with masks."""
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))
        pairs.append((draw(hnp.arrays(dtype, shape, elements=elements)), draw(hnp.arrays(bool, shape))))
    return pairs


def of(pairs: Pairs) -> Maps:
    return lambda: iter(pairs)


def pooled(pairs: Pairs) -> tuple[Array, Array]:
    return np.concatenate([m.ravel() for m, _ in pairs]), np.concatenate([k.ravel() for _, k in pairs])


def mixed(pairs: Pairs) -> bool:
    labels = pooled(pairs)[1]
    return bool(0 < labels.sum() < labels.size)


def f1_by_sklearn(labels: Array, scores: Array) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    return float(np.max(np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)))


def f1_at(threshold: float, labels: Array, scores: Array) -> float:
    called = scores >= threshold
    return 2 * np.count_nonzero(called & labels) / (np.count_nonzero(called) + np.count_nonzero(labels))


def aupro_by_fractions(pairs: Pairs, max_fpr: Fraction) -> Fraction:
    """Compute AUPRO by MVTec AD's definition, threshold by threshold, in exact arithmetic."""
    regions = [[m[place].item() for place in region] for m, k in pairs for region in flood_fill(k)]
    scores, labels = pooled(pairs)
    negatives = scores[~labels].tolist()
    curve = [(Fraction(0), Fraction(0))]
    for t in sorted(set(scores.tolist()), reverse=True):
        fpr = Fraction(sum(value >= t for value in negatives), len(negatives))
        shares = [Fraction(sum(value >= t for value in region), len(region)) for region in regions]
        curve.append((fpr, sum(shares, Fraction(0)) / len(shares)))
    area = Fraction(0)
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 >= max_fpr or x1 == x0:
            continue
        end = min(x1, max_fpr)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / max_fpr


def pro_200_by_loop(pairs: Pairs) -> float | None:
    """Compute PRO with the loop of the literature's code. Return None for a division by zero."""
    scores = [m.astype(np.float64) for m, _ in pairs]
    low, high = min(m.min() for m in scores), max(m.max() for m in scores)
    delta = (high - low) / 200
    if delta == 0:
        return None
    regions = [[region.coords.T for region in measure.regionprops(measure.label(k.astype(int)))] for _, k in pairs]
    pros, fprs = [], []
    for threshold in np.arange(low, high, delta):
        called = [m > threshold for m in scores]
        shares = [c[rows, columns].mean() for c, own in zip(called, regions, strict=True) for rows, columns in own]
        false = sum(np.count_nonzero(c & ~k) for c, (_, k) in zip(called, pairs, strict=True))
        pros.append(np.mean(shares))
        fprs.append(false / sum(np.count_nonzero(~k) for _, k in pairs))
    fpr, pro = np.array(fprs), np.array(pros)
    keep = fpr < 0.3
    fpr, pro = fpr[keep], pro[keep]
    if not fpr.size or fpr.max() == fpr.min():
        return None
    return float(auc((fpr - fpr.min()) / (fpr.max() - fpr.min()), pro))


@given(scored())
@settings(max_examples=100)
def test_image_metrics_are_scikit_learns(case: tuple[Array, Array]) -> None:
    scores, labels = case
    found = image_metrics(scores, labels)
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert found.f1max == pytest.approx(f1_by_sklearn(labels, scores), abs=1e-12)
    assert found.f1max_threshold is not None
    assert f1_at(found.f1max_threshold, labels, scores) == pytest.approx(found.f1max, abs=1e-15)
    assert (found.n_normal, found.n_anomalous) == (int((~labels).sum()), int(labels.sum()))


@given(st.one_of(map_sets(), map_sets(dtype=np.float64)).filter(mixed), st.integers(1, 40))
@settings(max_examples=100)
def test_pixel_metrics_are_scikit_learns_and_aupro_the_exact_one(pairs: Pairs, chunk_pixels: int) -> None:
    scores, labels = pooled(pairs)
    found = pixel_curves(of(pairs), pro_200=True, chunk_pixels=chunk_pixels).metrics
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert found.f1max == pytest.approx(f1_by_sklearn(labels, scores), abs=1e-12)
    assert found.f1max_threshold is not None
    assert f1_at(found.f1max_threshold, labels, scores) == pytest.approx(found.f1max, abs=1e-15)
    assert found.aupro == pytest.approx(float(aupro_by_fractions(pairs, Fraction(0.3))), abs=1e-9)
    assert found.n_regions == sum(len(flood_fill(k)) for _, k in pairs)


@given(map_sets().filter(mixed), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_aupro_ends_where_it_is_told(pairs: Pairs, max_fpr: float) -> None:
    found = pixel_metrics(of(pairs), max_fpr=max_fpr)
    assert found.aupro == pytest.approx(float(aupro_by_fractions(pairs, Fraction(max_fpr))), abs=1e-9)


@given(map_sets(elements=st.floats(-4, 4, width=32)).filter(mixed))
def test_pro_200_is_the_loop_of_the_literature(pairs: Pairs) -> None:
    found = pixel_metrics(of(pairs), pro_200=True).pro_200
    expected = pro_200_by_loop(pairs)
    assert (found is None) == (expected is None)
    assert expected is None or found == pytest.approx(expected, abs=1e-12)


def test_pro_200_when_scores_lie_on_its_thresholds() -> None:
    """Thresholds k/200, rounded up to float32, would equal scores above them."""
    scores = np.random.default_rng(0).choice(np.arange(201) / 200, (30, 40)).astype(np.float32)
    scores[0, :2] = 0.0, 1.0
    pairs = [(scores, square(40, (3, 3, 9, 9), (20, 20, 2, 5))[:30])]
    assert pixel_metrics(of(pairs), pro_200=True).pro_200 == pytest.approx(pro_200_by_loop(pairs), abs=1e-12)


def figures(found: PixelCurves) -> dict[str, Any]:
    return found.metrics.model_dump()


@given(map_sets(), st.integers(1, 60), st.randoms(use_true_random=False))
def test_order_of_images_and_chunks_change_not_one_bit(pairs: Pairs, chunk_pixels: int, rng: random.Random) -> None:
    shuffled = rng.sample(pairs, len(pairs))
    turned = [(m[::-1, ::-1].copy(), k[::-1, ::-1].copy()) for m, k in shuffled]
    whole = pixel_curves(of(pairs), pro_200=True)
    assert figures(pixel_curves(of(shuffled), pro_200=True, chunk_pixels=chunk_pixels)) == figures(whole)
    assert figures(pixel_curves(of(turned), pro_200=True)) == figures(whole)


@given(map_sets(elements=st.sampled_from([-0.0, 0.0, 0.125, 0.25, 0.5, 0.75, 1.0])))
@pytest.mark.parametrize(
    "rising",
    [
        lambda x: 1024 * x - 300,  # outside 0..1, some libraries apply a sigmoid per batch and create ties
        lambda x: 1 + x * 2.0**-20,
        np.exp2,
        lambda x: x.astype(np.float64) * (1 + 1e-12),
    ],
    ids=["affine", "narrow", "exponential", "float64"],
)
def test_a_strictly_rising_map_changes_no_bit_of_the_rank_figures(
    rising: Callable[[Array], Array], pairs: Pairs
) -> None:
    free = {"f1max_threshold", "pro_200"}
    mapped = [(rising(m), k) for m, k in pairs]
    assert pixel_metrics(of(mapped)).model_dump(exclude=free) == pixel_metrics(of(pairs)).model_dump(exclude=free)


def test_minus_zero_is_zero_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 40, 12)
        signs = [rng.choice([-0.0, 0.0], (1, size)).astype(np.float32) for size in sizes]
        noise = (rng.choice([-1.0, 0.0, 1.0], (1, 50)).astype(np.float32), np.zeros((1, 50), dtype=bool))
        pairs = [noise, *((scores, np.ones(scores.shape, dtype=bool)) for scores in signs)]
        plain = [(scores + np.float32(0), mask) for scores, mask in pairs]
        assert pixel_metrics(of(pairs)) == pixel_metrics(of(plain))


@given(map_sets().filter(mixed))
def test_repeating_the_set_changes_no_rate(pairs: Pairs) -> None:
    once, twice = pixel_metrics(of(pairs)), pixel_metrics(of(pairs * 2))
    for key in ("auroc", "ap", "f1max", "aupro"):
        assert getattr(twice, key) == pytest.approx(getattr(once, key), abs=1e-12)
    assert twice.n_regions == 2 * once.n_regions


@given(map_sets().filter(mixed))
def test_all_counts_at_hand_are_the_streamed_ones(pairs: Pairs) -> None:
    streamed, at_hand = pixel_curves(of(pairs)).counts, curves.count(*pooled(pairs))
    assert streamed.negatives == at_hand.negatives
    for name in ("thresholds", "true_positives", "false_positives", "false_positives_above"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(at_hand, name))


def square(side: int, *boxes: tuple[int, int, int, int]) -> Array:
    mask = np.zeros((side, side), dtype=bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def test_a_perfect_map_and_its_opposite() -> None:
    mask = square(20, (2, 2, 3, 3), (10, 10, 5, 1))
    pairs = [(mask.astype(np.float32), mask), (np.zeros((20, 20), dtype=np.float32), square(20))]
    found = pixel_metrics(of(pairs), pro_200=True)
    assert (found.auroc, found.ap, found.f1max, found.aupro, found.f1max_threshold) == (1.0, 1.0, 1.0, 1.0, 1.0)
    # the loop finds only one false positive rate and divides by zero
    assert found.pro_200 is None
    worst = pixel_metrics(of([(-m, k) for m, k in pairs]))
    assert (worst.auroc, worst.aupro) == (0.0, 0.0)


def test_a_constant_map_is_chance() -> None:
    mask = square(10, (0, 0, 5, 5))
    found = pixel_metrics(of([(np.full((10, 10), 0.7, dtype=np.float32), mask)]), pro_200=True)
    # all values are equal: the curve is the diagonal, and its area up to 0.3, divided by 0.3, is 0.15
    assert (found.auroc, found.ap, found.f1max) == (0.5, 0.25, 0.4)
    assert found.aupro == pytest.approx(0.15, abs=1e-15)
    assert found.pro_200 is None


def test_each_defect_counts_the_same_whatever_its_area() -> None:
    # the small defect of 1 pixel is found without false positives, the large one of 100 pixels never
    mask = square(40, (0, 0, 1, 1), (20, 20, 10, 10))
    scores = np.linspace(0.1, 0.2, 1600, dtype=np.float32).reshape(40, 40)
    scores[0, 0], scores[20:30, 20:30] = 1.0, 0.0
    assert pixel_metrics(of([(scores, mask)])).aupro == pytest.approx(0.5, abs=1e-12)


def test_pixels_that_touch_at_a_corner_are_one_defect() -> None:
    mask = np.eye(5, dtype=bool)
    assert pixel_metrics(of([(mask.astype(np.float32), mask)])).n_regions == 1


def test_average_precision_is_a_step_sum() -> None:
    # scores 3 2 1 with labels 1 0 1: precision 1 at recall 1/2, 2/3 at recall 1; the trapezoid would give 0.79
    found = image_metrics(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]))
    assert found.ap == pytest.approx(0.5 * 1 + 0.5 * 2 / 3, abs=1e-15)


def test_of_equal_f1_the_highest_threshold_is_named() -> None:
    found = image_metrics(np.array([4.0, 3.0, 2.0, 1.0, 0.0]), np.array([True, False, False, True, False]))
    # F1 is 2/3 at threshold 4 and 4/6 at threshold 1
    assert found.f1max == pytest.approx(2 / 3)
    assert found.f1max_threshold == 4.0


@pytest.mark.parametrize(
    ("scores", "labels", "auroc", "ap", "f1max"),
    [
        ([], [], None, None, None),
        ([1.0, 2.0], [False, False], None, None, None),
        ([1.0, 2.0], [True, True], None, None, None),
        ([0.0, 0.0], [True, False], 0.5, 0.5, 2 / 3),
    ],
    ids=["empty", "normal only", "anomalous only", "tie"],
)
def test_one_class_and_none(
    scores: list[float], labels: list[bool], auroc: float | None, ap: float | None, f1max: float | None
) -> None:
    found = image_metrics(np.array(scores, dtype=np.float64), np.array(labels, dtype=bool))
    assert (found.auroc, found.ap) == (auroc, ap)
    assert found.f1max == pytest.approx(f1max)
    assert (found.f1max_threshold is None) == (f1max is None)


@pytest.mark.parametrize("pro_200", [False, True])
def test_pixels_of_one_class_and_none(pro_200: bool) -> None:
    ramp = np.arange(12, dtype=np.float32).reshape(3, 4)
    nothing = pixel_metrics(of([]), pro_200=pro_200)
    normal = pixel_metrics(of([(ramp, np.zeros((3, 4), dtype=bool))]), pro_200=pro_200)
    for found in (nothing, normal):
        assert {found.auroc, found.ap, found.f1max, found.f1max_threshold, found.aupro, found.pro_200} == {None}
    assert (nothing.n_images, normal.n_images, normal.n_normal_px) == (0, 1, 12)
    anomalous = pixel_metrics(of([(ramp, np.ones((3, 4), dtype=bool))]), pro_200=pro_200)
    assert (anomalous.auroc, anomalous.aupro, anomalous.pro_200) == (None, None, None)
    assert (anomalous.ap, anomalous.f1max, anomalous.f1max_threshold) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("anomalous", [False, True])
def test_a_score_that_is_no_number_is_refused(bad: float, anomalous: bool) -> None:
    scores = np.zeros((3, 3), dtype=np.float32)
    scores[1, 1] = bad
    mask = np.zeros((3, 3), dtype=bool)
    mask[1, 1] = anomalous
    with pytest.raises(ValueError, match="NaN or infinite"):
        pixel_metrics(of([(scores, mask)]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        image_metrics(scores.ravel().astype(np.float64), mask.ravel())


def test_a_source_that_runs_dry_is_refused() -> None:
    spent = iter([(np.zeros((2, 2), dtype=np.float32), np.eye(2, dtype=bool))])
    with pytest.raises(ValueError, match="in the second"):
        pixel_metrics(lambda: spent)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="mask"):
        pixel_metrics(of([(np.zeros((2, 2), dtype=np.float32), np.zeros((2, 3), dtype=bool))]))


def test_memory_is_bounded_by_the_anomalous_pixels() -> None:
    shape, images = (256, 256), 60
    mask = np.zeros(shape, dtype=bool)
    mask[:8, :8] = True

    def source() -> Iterator[tuple[Array, Array]]:
        rng = np.random.default_rng(0)
        for _ in range(images):
            yield rng.random(shape, dtype=np.float32), mask

    tracemalloc.start()
    pixel_curves(source, pro_200=True, chunk_pixels=1 << 17)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # all maps are 15.7 MB; a chunk is 0.5 MB and the anomalous pixels 16 B x 3,840
    assert peak < 4e6


def test_memory_of_many_maps_is_that_of_few_at_the_size_of_chunks_in_use() -> None:
    side = 1024
    rising = np.linspace(0, 1, side * side, dtype=np.float32).reshape(side, side)
    mask = np.zeros((side, side), dtype=bool)
    mask[100:1000, 100:1000] = True

    def peak(images: int) -> int:
        def source() -> Iterator[tuple[Array, Array]]:
            for number in range(images):
                yield rising + np.float32(number), mask & (number == 0)

        tracemalloc.start()
        counted = pixel_curves(source, pro_200=True).metrics
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert counted.n_normal_px + counted.n_anomalous_px == images * side * side
        return found

    # complete chunks, and more of them than are processed in parallel; the anomalous pixels are the same
    few = (COUNTING_THREADS + 1) * CHUNK_PIXELS // side**2
    of_few = peak(few)
    # it varies a little, because the scores are sorted in parallel with the first chunks
    assert peak(2 * few) < 1.1 * of_few
    # float32 buffers, five maps with masks in progress, and less than 80 B per anomalous pixel
    assert of_few < (COUNTING_THREADS + 1) * CHUNK_PIXELS * 4 + 5 * 5 * side**2 + 80 * mask.sum()


@given(map_sets().filter(mixed))
def test_drawn_curves_are_scikit_learns(pairs: Pairs) -> None:
    scores, labels = pooled(pairs)
    counts = pixel_curves(of(pairs)).counts
    roc, pr = curves.roc_points(counts), curves.pr_points(counts)
    assert roc is not None
    assert pr is not None
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    # our curve has only the corners: the line through them must pass through all points of scikit-learn
    assert {(0.0, 0.0), (1.0, 1.0)} <= set(zip(roc.x.tolist(), roc.y.tolist(), strict=True))
    assert auc(roc.x, roc.y) == pytest.approx(auc(fpr, tpr), abs=1e-12)
    precision, recall, _ = precision_recall_curve(labels, scores)
    apart = np.abs(pr.x[:, None] - recall) + np.abs(pr.y[:, None] - precision)
    assert apart.min(axis=1).max() < 1e-12


def test_thinned_curves_keep_their_ends_and_stay_close() -> None:
    rng = np.random.default_rng(1)
    labels = rng.random(50_000) < 0.1
    counts = curves.count(rng.normal(size=50_000) + labels, labels)
    whole, thin = curves.roc_points(counts, 10**9), curves.roc_points(counts, 200)
    assert whole is not None
    assert thin is not None
    assert thin.x.size <= 202
    assert (thin.x[0], thin.y[0], thin.x[-1], thin.y[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert np.abs(np.interp(whole.x, thin.x, thin.y) - whole.y).max() < 0.02


def test_curves_of_one_class_are_not_drawn() -> None:
    normal = curves.count(np.array([1.0, 2.0]), np.array([False, False]))
    assert curves.roc_points(normal) is None
    assert curves.pr_points(normal) is None


def test_every_figure_is_defined_in_words() -> None:
    measured = {
        "image": image_metrics(np.array([1.0, 2.0]), np.array([False, True])),
        "pixel": pixel_metrics(of([]), pro_200=True),
    }
    for level, figures in measured.items():
        names = {key for key in figures.model_dump() if not key.startswith(("n_", "max_"))}
        rows = {key: metric for key, metric in METRICS.items() if metric.level == level}
        assert {key.removeprefix(f"{level}_") for key in rows} == {key for key in names if "threshold" not in key}
        for key, metric in rows.items():
            assert metric.value(figures) == getattr(figures, key.removeprefix(f"{level}_"))
            assert metric.short_title in definitions(0.3)
    assert METRICS["image_auroc"].value(measured["image"]) == 1


@given(st.lists(st.tuples(few_values, st.integers(1, 9)), min_size=1, max_size=30))
def test_regions_of_any_size_weigh_one(rows: list[tuple[float, int]]) -> None:
    """With one normal pixel far below all others, each region is found completely before any false positive."""
    assume(all(value > -1e30 for value, _ in rows))
    pairs = [(np.full((1, size), value, dtype=np.float32), np.ones((1, size), dtype=bool)) for value, size in rows]
    pairs.append((np.full((1, 1), -2e30, dtype=np.float32), np.zeros((1, 1), dtype=bool)))
    found = pixel_metrics(of(pairs))
    assert found.aupro == pytest.approx(1.0, abs=1e-12)
    assert found.n_regions == len(rows)
