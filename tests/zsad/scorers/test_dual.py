"""Tests of scores against eq. 1-6, 12 and 13 in plain Python loops, and of the choice of references."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.zsad.feature_sets import unit
from tests.zsad.learned_sets import cosine, dot
from zsad.config.run import ReferenceSettings, ScoreSettings, Variant
from zsad.scorers.dual import scorer as dual
from zsad.scorers.dual.scorer import (
    Aggregate,
    Evidence,
    fuse_image,
    fuse_map,
    text_scores,
    visual_scores,
)
from zsad.scorers.references import draw_references

Vector = Sequence[float]
LAMBDAS = ScoreSettings(
    lambda_1=0.7, lambda_2=1.3, lambda_3=0.9, lambda_4=1.7, lambda_5=0.4, lambda_text=2.1, variants=("text",)
)


def _f(v: Vector, t_a: Vector, t_n: Vector, tau: float) -> float:
    """Compute eq. 1 as printed."""
    up = math.exp(dot(v, t_a) / tau)
    return up / (math.exp(dot(v, t_n) / tau) + up)


def _a_v(query: list[Vector], reference: list[Vector]) -> list[float]:
    """Compute eq. 5 as printed."""
    out = []
    for q in query:
        least = math.inf
        for r in reference:
            least = min(least, 1 - cosine(q, r))
        out.append(least)
    return out


@pytest.mark.parametrize("tau", [1.0, 0.07, 0.01])
def test_text_scores_are_eq_1_to_3(tau: float) -> None:
    tokens, text = unit(2, 3, 5, 16), unit(2, 16, seed=1)
    ours = text_scores(tokens, text, tau)
    normal, anomalous = text.double().tolist()
    for image in range(2):
        for crop in range(3):
            for patch in range(5):
                expected = _f(tokens[image, crop, patch].double().tolist(), anomalous, normal, tau)
                assert ours[image, crop, patch].item() == pytest.approx(expected, rel=1e-5)


def test_a_token_of_either_text_scores_on_its_side() -> None:
    text = torch.eye(2, 8)
    assert text_scores(text, text, 0.01).tolist() == pytest.approx([0, 1], abs=1e-6)
    assert text_scores(torch.eye(8)[5], text, 0.01).item() == 0.5


@pytest.mark.parametrize("sizes", [(9,), (9, 9), (9, 18, 27), (9, 27, 9, 18)])
@pytest.mark.parametrize("aggregate", ["min", "mean", "median"])
def test_visual_scores_are_eq_5_with_ragged_references(sizes: tuple[int, ...], aggregate: Aggregate) -> None:
    query = unit(18, 6)
    references = [unit(size, 6, seed=i + 1) for i, size in enumerate(sizes)]
    each = [_a_v(query.double().tolist(), reference.double().tolist()) for reference in references]
    middle: Callable[[Sequence[float]], float] = statistics.median
    combine: dict[Aggregate, Callable[[Sequence[float]], float]] = {
        "min": min,
        "mean": statistics.fmean,
        "median": middle,
    }
    expected = [combine[aggregate](column) for column in zip(*each, strict=True)]
    np.testing.assert_allclose(visual_scores(query, references, aggregate), expected, atol=1e-6)


def test_the_minimum_over_references_is_one_memory_of_all_their_patches() -> None:
    query, references = unit(10, 8), unit(3, 7, 8, seed=1)
    pooled = visual_scores(query, [references.flatten(0, 1)])
    torch.testing.assert_close(visual_scores(query, references.unbind()), pooled)


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = unit(50, 8), unit(30, 8, seed=1)
    whole = visual_scores(query, [reference])
    for limit in (1, 29, 30, 61, 700):
        monkeypatch.setattr(dual, "MAX_COSINES", limit)
        torch.testing.assert_close(visual_scores(query, [reference]), whole)


def test_an_image_in_its_own_memory_is_not_anomalous() -> None:
    query = unit(20, 8)
    assert (
        visual_scores(query, [query[torch.randperm(20, generator=torch.Generator().manual_seed(0))]]).abs().max() < 1e-6
    )


@pytest.mark.parametrize("crops", [1, 3])
def test_fusion_is_eq_6_12_13(crops: int) -> None:
    rng = np.random.default_rng(crops)
    part = {name: rng.random((crops, 4), dtype=np.float32) for name in ("a_l", "a_v", "a_t", "a_t_text")}
    classes = rng.random(crops, dtype=np.float32)
    evidence = Evidence(classes, **part)
    l1, l2, l3, l4, l5, lt = 0.7, 1.3, 0.9, 1.7, 0.4, 2.1
    a_l, a_v, a_t, a_tt = (part[name].tolist() for name in ("a_l", "a_v", "a_t", "a_t_text"))
    a_cls = sum(classes.tolist()) / crops

    def top(rows: list[list[float]]) -> float:
        return max(value for row in rows for value in row)

    def each(weights: Sequence[tuple[float, list[list[float]]]]) -> list[list[float]]:
        return [[sum(w * m[c][p] for w, m in weights) for p in range(4)] for c in range(crops)]

    maps: dict[Variant, list[list[float]]] = {
        "text": a_l,
        "text_tta": each([(l2, a_tt)]),
        "visual": a_v,
        "joint": each([(l1, a_v), (lt, a_l)]),
        "joint_tta": each([(l1, a_v), (l2, a_t)]),
    }
    images: dict[Variant, float] = {
        "text": a_cls,
        "text_tta": l3 * a_cls + l5 * top(a_tt),
        "visual": top(a_v),
        "joint": l3 * a_cls + l4 * top(a_v) + l5 * top(a_l),
        "joint_tta": l3 * a_cls + l4 * top(a_v) + l5 * top(a_t),
    }
    for variant, expected in maps.items():
        np.testing.assert_allclose(fuse_map(evidence, variant, LAMBDAS), expected, rtol=1e-6)
        assert fuse_image(evidence, variant, LAMBDAS) == pytest.approx(images[variant], rel=1e-6)


def test_a_variant_without_its_evidence_is_refused() -> None:
    with pytest.raises(ValueError, match="not scored"):
        fuse_map(Evidence(), "visual", LAMBDAS)


def _digests(count: int, name: str = "image") -> list[str]:
    return [hashlib.sha256(f"{name} {i}".encode()).hexdigest() for i in range(count)]


@given(
    contents=st.lists(st.integers(0, 12), min_size=1, max_size=14),
    seed=st.integers(0, 9),
    count=st.integers(0, 8),
    shuffle=st.randoms(use_true_random=False),
)
def test_laws_of_drawing(contents: list[int], seed: int, count: int, shuffle: object) -> None:
    every = _digests(13)
    digests = [every[content] for content in contents]
    drawn = draw_references(digests, seed, count)
    others = len(set(digests)) - 1
    assert drawn.shape == (len(digests), min(count, others))
    chosen = {digest: [digests[row] for row in rows] for digest, rows in zip(digests, drawn.tolist(), strict=True)}
    for row, digest in enumerate(digests):
        assert [digests[other] for other in drawn[row]] == chosen[digest], "equal content, equal references"
        assert digest not in chosen[digest], "never itself"
        assert len(set(chosen[digest])) == len(chosen[digest]), "no reference twice"
    # a larger count only adds references
    np.testing.assert_array_equal(draw_references(digests, seed, count + 1)[:, : drawn.shape[1]], drawn)
    # another order of the files gives the same references
    mixed = digests.copy()
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    again = draw_references(mixed, seed, count)
    assert {d: [mixed[row] for row in rows] for d, rows in zip(mixed, again.tolist(), strict=True)} == chosen


def test_seeds_draw_differently_and_evenly() -> None:
    digests = _digests(8)
    pairs = Counter[tuple[int, int]]()
    for seed in range(700):
        for row, (reference,) in enumerate(draw_references(digests, seed, 1).tolist()):
            pairs[row, reference] += 1
    # 56 ordered pairs, each binomial with 700 draws at 1/7: mean 100, sd 9.3
    assert len(pairs) == 56
    assert all(60 < count < 145 for count in pairs.values())
    chi_squared = sum((count - 100) ** 2 / 100 for count in pairs.values())
    # 8 rows x 6 degrees of freedom = 48, sd 9.8
    assert 15 < chi_squared < 95


def test_the_second_reference_is_as_even_as_the_first() -> None:
    digests = _digests(5)
    second = Counter(
        (row, rows[1]) for seed in range(600) for row, rows in enumerate(draw_references(digests, seed, 3).tolist())
    )
    assert len(second) == 20
    assert all(100 < count < 205 for count in second.values())


def test_all_others_are_drawn_when_as_many_are_asked_for() -> None:
    drawn = draw_references(_digests(6), 3, 5)
    for row, rows in enumerate(drawn.tolist()):
        assert sorted([row, *rows]) == list(range(6))


def test_default_weights_are_the_papers() -> None:
    settings = ScoreSettings()
    lambdas = [getattr(settings, f"lambda_{i}") for i in range(1, 6)]
    assert lambdas == [1, 1.5, 1, 1, 1]
    assert settings.references == ReferenceSettings(count=1, aggregate="min")
