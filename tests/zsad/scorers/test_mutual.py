"""Tests of mutual scoring against loops over numbers that follow the paper, and tests of its properties."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn.functional import normalize

from zsad.scorers import cosines
from zsad.scorers.cosines import Operand, largest_cosines, operand
from zsad.scorers.musc import mutual
from zsad.scorers.musc.mutual import circle_scores, lowest_mean, mutual_scores

CPU = torch.device("cpu")
SIZES = (4, 9, 4, 18, 1, 9, 4, 9, 4, 4, 9, 2)


def _images(sizes: Sequence[int], width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(size, width, generator=generator), dim=-1) for size in sizes]


def _scores(images: Sequence[torch.Tensor], share: float = 0.3, batch_size: int = 4) -> list[torch.Tensor]:
    sizes = [len(image) for image in images]
    found = dict(mutual_scores(images.__getitem__, sizes, share, batch_size, CPU))
    return [found[number] for number in range(len(images))]


def _by_loops(images: Sequence[torch.Tensor], share: float) -> list[list[float]]:
    """Return for each patch the mean of the lowest share of its smallest distances to the other images."""
    values = [image.double().tolist() for image in images]
    out = []
    for i, query in enumerate(values):
        scores = []
        for patch in query:
            to_images = []
            for j, other in enumerate(values):
                if j == i:
                    continue
                least = math.inf
                for candidate in other:
                    least = min(least, math.dist(patch, candidate))
                to_images.append(least)
            to_images.sort()
            count = max(1, math.floor(share * len(to_images)))
            scores.append(sum(to_images[:count]) / count)
        out.append(scores)
    return out


def _assert_scores(found: Sequence[torch.Tensor], expected: Sequence[Sequence[float]]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), torch.tensor(theirs, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", range(2, 13))
def test_scores_are_the_loops_of_the_paper(count: int) -> None:
    images = _images(SIZES[:count], seed=count)
    _assert_scores(_scores(images), _by_loops(images, 0.3))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.75, 1.0])
def test_the_share_decides_how_many_distances_are_averaged(share: float) -> None:
    images = _images(SIZES[:7])
    _assert_scores(_scores(images, share), _by_loops(images, share))


@pytest.mark.parametrize(("others", "averaged"), [(1, 1), (3, 1), (4, 1), (6, 1), (7, 2), (10, 3), (11, 3), (99, 29)])
def test_three_of_ten_distances_are_averaged_and_one_at_least(others: int, averaged: int) -> None:
    distances = torch.linspace(0.5, 1.5, others)
    cosines = (1 - distances**2 / 2)[torch.randperm(others, generator=torch.Generator().manual_seed(0))]
    expected = distances[:averaged].mean()
    torch.testing.assert_close(lowest_mean(cosines[:, None], 0.3)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 11, 12, 100])
def test_batches_of_any_size_give_the_same(batch_size: int) -> None:
    images = _images(SIZES)
    _assert_scores(_scores(images, batch_size=batch_size), _by_loops(images, 0.3))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("limit", [1, 400, 1500, 2500])
def test_scores_in_several_runs_are_the_same(monkeypatch: pytest.MonkeyPatch, limit: int, batch_size: int) -> None:
    images = _images(SIZES)
    monkeypatch.setattr(mutual, "COSINES_BYTES", limit)
    _assert_scores(_scores(images, batch_size=batch_size), _by_loops(images, 0.3))


@pytest.mark.parametrize("piece", [1, 2, 4, 5, 17, 18])
def test_images_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    images = _images(SIZES[:6])
    monkeypatch.setattr(cosines, "PIECE_PATCHES", piece)
    _assert_scores(_scores(images), _by_loops(images, 0.3))


def test_both_products_of_a_cpu_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _images((70, 50), width=96)
    one_dnn = largest_cosines(operand(first), operand(second))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = largest_cosines(operand(first), operand(second))
    for mine, other in zip(one_dnn, plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


def test_products_in_bf16_change_distances_little() -> None:
    """A cosine minus one is rounded to 8 bits: 2^-9 of a distance. The vectors' lengths change by about 1e-4."""
    first, second = _images((300, 280), width=384)
    near = normalize(first[:280] + torch.linspace(0, 1, 280)[:, None] * second, dim=-1)
    for other in (second, near):
        exact = largest_cosines(operand(first), operand(other))
        low = largest_cosines(operand(first, bf16=True), operand(other, bf16=True))
        for mine, theirs in zip(low, exact, strict=True):
            distances = [(2 - 2 * one).clamp(min=0).sqrt() for one in (mine, theirs)]
            error = (distances[0] - distances[1]).abs()
            assert error.max() < 0.03, "near copies"
            assert error[distances[1] > 0.2].max() < 0.004


@pytest.mark.parametrize(("count", "partners"), [(3, 2), (5, 4), (7, 2), (9, 5), (12, 6)])
def test_in_a_circle_an_image_is_compared_with_its_neighbours(count: int, partners: int) -> None:
    images = _images(SIZES[:count])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3)).tolist()
    pairs = []
    found = dict(circle_scores(images.__getitem__, order, partners, 0.3, on_pair=lambda: pairs.append(1)))
    assert len(pairs) == count * (partners // 2)
    assert sorted(found) == list(range(count))
    for place, number in enumerate(order):
        near = [order[(place + step) % count] for step in range(-(partners // 2), partners // 2 + 1) if step]
        expected = _by_loops([images[number], *(images[other] for other in near)], 0.3)[0]
        torch.testing.assert_close(found[number].double(), torch.tensor(expected).double(), atol=1e-5, rtol=0)


def test_one_more_image_changes_one_partner_of_its_neighbours_alone() -> None:
    images = _images([4] * 12)
    order = list(range(11))
    before = dict(circle_scores(images.__getitem__, order, 4, 1.0))
    after = dict(circle_scores(images.__getitem__, [*order[:5], 11, *order[5:]], 4, 1.0))
    changed = {number for number in order if not torch.equal(before[number], after[number])}
    assert changed == {3, 4, 5, 6}


def test_a_circle_needs_more_images_than_partners() -> None:
    with pytest.raises(ValueError, match="4 partners in a circle of 4"):
        list(circle_scores(_images([2] * 4).__getitem__, range(4), 4, 0.3))


def _counting(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count how often two images are multiplied, in any order. Images are identified by their sizes."""
    seen: Counter[int] = Counter()

    def counted(first: Operand, second: Operand) -> tuple[torch.Tensor, torch.Tensor]:
        seen[len(first.pieces[0]) * len(second.pieces[0])] += 1
        return largest_cosines(first, second)

    monkeypatch.setattr(mutual, "largest_cosines", counted)
    return seen


PRIMES = (2, 3, 5, 7, 11, 13, 17)
"""Sizes with a different product for every pair."""


def test_each_pair_is_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _counting(monkeypatch)
    _scores(_images(PRIMES), batch_size=3)
    assert seen == Counter({a * b: 1 for a in PRIMES for b in PRIMES if a < b})


def test_where_memory_is_short_pairs_scored_apart_are_multiplied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _counting(monkeypatch)
    monkeypatch.setattr(mutual, "COSINES_BYTES", 4 * len(PRIMES) * (2 + 3 + 5 + 7))
    _scores(_images(PRIMES), batch_size=2)
    runs = ((2, 3, 5, 7), (11, 13), (17,))
    apart = {a: run for run in runs for a in run}
    assert seen == Counter({a * b: 1 + (apart[a] != apart[b]) for a in PRIMES for b in PRIMES if a < b})


def test_features_are_read_batch_by_batch() -> None:
    images = _images([4] * 12)
    reads: Counter[int] = Counter()

    def read(number: int) -> torch.Tensor:
        reads[number] += 1
        return images[number]

    list(mutual_scores(read, [4] * 12, 0.3, 4, CPU))
    assert reads == Counter({number: 1 + number // 4 for number in range(12)})


@pytest.mark.parametrize("change", [lambda n: list(reversed(range(n))), lambda n: [(5 * i + 3) % n for i in range(n)]])
def test_another_order_of_images_orders_scores_otherwise(change: Callable[[int], list[int]]) -> None:
    images = _images(SIZES)
    order = change(len(images))
    plain, moved = _scores(images), _scores([images[i] for i in order])
    for place, number in enumerate(order):
        torch.testing.assert_close(moved[place], plain[number], atol=1e-5, rtol=0)


def test_another_order_of_patches_orders_an_images_scores_alone() -> None:
    images = _images(SIZES[:6])
    plain = _scores(images)
    order = torch.randperm(len(images[3]), generator=torch.Generator().manual_seed(0))
    moved = _scores([*images[:3], images[3][order], *images[4:]])
    for number, (mine, other) in enumerate(zip(moved, plain, strict=True)):
        torch.testing.assert_close(mine, other[order] if number == 3 else other, atol=1e-5, rtol=0)


def test_a_rotation_of_all_features_changes_nothing() -> None:
    images = _images(SIZES[:6], width=8)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    for mine, other in zip(_scores([image @ rotation for image in images]), _scores(images), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_equal_images_are_at_no_distance() -> None:
    image = _images([9], width=32)[0]
    shuffled = [image[torch.randperm(9, generator=torch.Generator().manual_seed(n))] for n in range(6)]
    assert max(float(scores.max()) for scores in _scores(shuffled)) < 2e-3


def test_opposite_images_are_at_distance_two() -> None:
    image = torch.eye(1, 5)
    assert [scores.tolist() for scores in _scores([image, -image])] == [[2], [2]]


def test_a_lone_image_is_refused() -> None:
    with pytest.raises(ValueError, match="1 images"):
        _scores(_images([4]))
