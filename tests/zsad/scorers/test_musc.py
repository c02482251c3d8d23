"""Tests of MuSc and MuSc-2 against loops over numbers that follow the paper, and tests of their properties."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from medad.base.errors import InputError
from tests.zsad.tiny_clip import noise_images, tiny_encoder
from zsad.clip.feature_store import CLASS_TOKENS, INDEX, FeatureIndex, FeatureStore, ImageRows, output_file
from zsad.config.run import EncoderSettings
from zsad.scorers.interface import CategoryFeatures, Scored
from zsad.scorers.musc.score import aggregate, rescore, score
from zsad.scorers.musc.settings import MuSc, MuSc2
from zsad.scorers.references import draw_references
from zsad.scorers.scores_file import SystemScores
from zsad.steps.encode import encode_images
from zsad.steps.score import score_system

GRID, WIDTH, DIM = 3, 5, 4
CROPS = (1, 2, 1, 1, 3, 1, 2, 1, 1, 1, 1, 1)
BLOCKS = (1, 3)
Matrix = list[list[float]]
Blocks = dict[str, np.ndarray]


def _category_features(
    folder: Path, crops: Sequence[int], blocks: Blocks, tokens: np.ndarray, references: int = 0
) -> CategoryFeatures:
    """Write features as on disk: one row per crop, blocks with the class token first."""
    firsts = np.cumsum([0, *crops])
    images = tuple(
        ImageRows(
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
            height=32,
            width=32,
            canvas=(32, 32),
            offsets=((0, 0),) * rows,
            first_row=int(first),
            rows=rows,
        )
        for number, (rows, first) in enumerate(zip(crops, firsts, strict=False))
    )
    index = FeatureIndex(
        size_px=32,
        grid=GRID,
        dim=DIM,
        model="none",
        random_weights=True,
        identity={},
        images=images,
        problems=(),
        outputs=dict.fromkeys(blocks, (1 + GRID**2, WIDTH)),
    )
    folder.mkdir()
    np.save(folder / CLASS_TOKENS, tokens.astype("<f4"))
    for name, rows in blocks.items():
        np.save(folder / output_file(name), rows.astype("<f4"))
    (folder / INDEX).write_text(index.model_dump_json(by_alias=True), encoding="utf-8")
    store = FeatureStore(folder)
    return CategoryFeatures(
        store=store,
        text=None,
        references=draw_references(store.digests, 0, references),
        shots=None,
        paths=tuple(folder / f"{number}.png" for number in range(len(crops))),
        category="object",
        encoder=EncoderSettings(seed=0),
        checkpoint=None,
        seed=0,
        device=torch.device("cpu"),
        batch_size=4,
    )


def _features(crops: Sequence[int], seed: int = 0) -> tuple[Blocks, np.ndarray]:
    """Return random blocks with class tokens that must not be read, and class tokens as similar as CLIP's."""
    rng = np.random.default_rng(seed)
    blocks = {f"block-{number}": rng.normal(0.3, 2, (sum(crops), 1 + GRID**2, WIDTH)) for number in BLOCKS}
    for rows in blocks.values():
        rows[:, 0] = 1e6
    tokens = rng.normal(0, 0.3, (sum(crops), DIM)) + 1
    return blocks, tokens / np.linalg.norm(tokens, axis=1, keepdims=True)


def _lnamd(patches: Matrix, degree: int) -> Matrix:
    """Apply LayerNorm over the whole map, average degree x degree neighbours with zeros outside, and normalise."""
    values = [value for patch in patches for value in patch]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    normed = [[(value - mean) / math.sqrt(variance + 1e-5) for value in patch] for patch in patches]
    grid, width, reach = math.isqrt(len(patches)), len(patches[0]), degree // 2
    out = []
    for y in range(grid):
        for x in range(grid):
            pooled = [0.0] * width
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < grid and 0 <= x + dx < grid:
                        for channel in range(width):
                            pooled[channel] += normed[(y + dy) * grid + x + dx][channel] / degree**2
            length = math.sqrt(sum(value**2 for value in pooled))
            out.append([value / length for value in pooled])
    return out


def _maps_by_loops(
    crops: Sequence[int], blocks: Blocks, degrees: Sequence[int], share: float, compared: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return the patch scores of each image, crop after crop, from the images that it is compared with."""
    sums = [[0.0] * (rows * GRID**2) for rows in crops]
    firsts = [sum(crops[:number]) for number in range(len(crops))]
    for rows in blocks.values():
        for degree in degrees:
            images = []
            for first, count in zip(firsts, crops, strict=True):
                patches: Matrix = []
                for row in range(first, first + count):
                    patches += _lnamd(rows[row, 1:].astype("<f4").astype(float).tolist(), degree)
                images.append(patches)
            for i, others in enumerate(compared):
                for p, patch in enumerate(images[i]):
                    found = sorted(min(math.dist(patch, other) for other in images[j]) for j in others)
                    count = max(1, math.floor(share * len(found)))
                    sums[i][p] += sum(found[:count]) / count
    passes = len(blocks) * len(degrees)
    return [[value / passes for value in each] for each in sums]


def _rescored_by_loops(scores: Sequence[float], tokens: Matrix, neighbours: Sequence[int]) -> list[float]:
    out = []
    for i in range(len(scores)):
        similar = [sum(a * b for a, b in zip(tokens[i], tokens[j], strict=True)) for j in range(len(scores))]
        others = sorted((j for j in range(len(scores)) if j != i), key=lambda j: -similar[j])
        total = 0.0
        for k in neighbours:
            window = [i, *others][:k]
            total += sum(similar[j] * scores[j] for j in window) / sum(similar[j] for j in window)
        out.append(total / len(neighbours))
    return out


def _image_tokens(crops: Sequence[int], tokens: np.ndarray) -> Matrix:
    """Return the normalised mean over the crops of each image."""
    out: Matrix = []
    first = 0
    for count in crops:
        mean = tokens[first : first + count].astype("<f4").astype(float).mean(axis=0)
        out.append((mean / np.linalg.norm(mean)).tolist())
        first += count
    return out


def _sorted(found: Sequence[Scored]) -> list[Scored]:
    return sorted(found, key=lambda one: one.number)


def _assert_scored(
    found: Sequence[Scored], crops: Sequence[int], maps: Sequence[list[float]], scores: Sequence[float]
) -> None:
    assert [one.number for one in found] == list(range(len(crops)))
    for one, rows, expected, value in zip(found, crops, maps, scores, strict=True):
        wanted = torch.tensor(expected, dtype=torch.float64).reshape(rows, GRID, GRID)
        torch.testing.assert_close(one.map.double(), wanted, atol=1e-5, rtol=0)
        assert one.score == pytest.approx(value, abs=1e-5)


def _others(count: int) -> list[list[int]]:
    return [[j for j in range(count) if j != i] for i in range(count)]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("neighbours", [(), (1, 8, 9)])
def test_musc_is_the_loops_of_the_paper(tmp_path: Path, count: int, neighbours: tuple[int, ...]) -> None:
    crops = CROPS[:count]
    blocks, tokens = _features(crops, seed=count)
    settings = MuSc(blocks=BLOCKS, degrees=(1, 3), neighbours=neighbours)
    found = _sorted(list(score(_category_features(tmp_path / "f", crops, blocks, tokens), settings)))
    maps = _maps_by_loops(crops, blocks, (1, 3), 0.3, _others(count))
    tops = [max(each) for each in maps]
    scores = _rescored_by_loops(tops, _image_tokens(crops, tokens), neighbours) if neighbours else tops
    _assert_scored(found, crops, maps, scores)


@pytest.mark.parametrize("references", [1, 4])
def test_musc_2_is_the_loops_with_the_drawn_images_alone(tmp_path: Path, references: int) -> None:
    crops = CROPS[:6]
    blocks, tokens = _features(crops)
    category_features = _category_features(tmp_path / "f", crops, blocks, tokens, references)
    settings = MuSc2(blocks=BLOCKS, degrees=(1, 3, 5), share=0.5, references=references)
    maps = _maps_by_loops(crops, blocks, (1, 3, 5), 0.5, category_features.references.tolist())
    _assert_scored(list(score(category_features, settings)), crops, maps, [max(each) for each in maps])
    top = settings.model_copy(update={"top_share": 0.2})
    means = [np.mean(sorted(each, reverse=True)[: int(0.2 * len(each))]) for each in maps]
    _assert_scored(list(score(category_features, top)), crops, maps, [float(mean) for mean in means])


def test_musc_2_of_two_images_is_musc_of_two_images(tmp_path: Path) -> None:
    crops = (1, 3)
    blocks, tokens = _features(crops)
    category_features = _category_features(tmp_path / "f", crops, blocks, tokens, references=1)
    mutual = _sorted(list(score(category_features, MuSc(blocks=BLOCKS, neighbours=()))))
    drawn = _sorted(list(score(category_features, MuSc2(blocks=BLOCKS))))
    for mine, other in zip(drawn, mutual, strict=True):
        torch.testing.assert_close(mine.map, other.map, atol=1e-5, rtol=0)
        assert mine.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_of_any_size_give_the_same(tmp_path: Path, batch_size: int) -> None:
    blocks, tokens = _features(CROPS)
    category_features = _category_features(tmp_path / "f", CROPS, blocks, tokens)
    settings = MuSc(blocks=BLOCKS)
    plain = list(score(category_features, settings))
    for mine, other in zip(score(replace(category_features, batch_size=batch_size), settings), plain, strict=True):
        assert mine.number == other.number
        torch.testing.assert_close(mine.map, other.map, atol=1e-5, rtol=0)
        assert mine.score == pytest.approx(other.score, abs=1e-5)


def test_another_order_of_images_orders_scores_otherwise(tmp_path: Path) -> None:
    blocks, tokens = _features(CROPS)
    order = [(5 * i + 3) % len(CROPS) for i in range(len(CROPS))]
    firsts = np.cumsum([0, *CROPS])
    rows = [row for i in order for row in range(firsts[i], firsts[i + 1])]
    settings = MuSc(blocks=BLOCKS)
    plain = list(score(_category_features(tmp_path / "plain", CROPS, blocks, tokens), settings))
    moved_blocks = {name: each[rows] for name, each in blocks.items()}
    moved = _category_features(tmp_path / "moved", [CROPS[i] for i in order], moved_blocks, tokens[rows])
    for mine, number in zip(score(moved, settings), order, strict=True):
        torch.testing.assert_close(mine.map, plain[number].map, atol=1e-5, rtol=0)
        assert mine.score == pytest.approx(plain[number].score, abs=1e-5)


def test_a_inserted_patch_is_the_most_anomalous(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    crops = (1,) * 8
    one = rng.normal(0, 1, (1 + GRID**2, WIDTH))
    blocks = {f"block-{number}": one + rng.normal(0, 0.05, (8, *one.shape)) for number in BLOCKS}
    for rows in blocks.values():
        rows[5, 1 + 4] = -4 * one[1 + 4]
    tokens = np.full((8, DIM), 0.5)
    found = list(score(_category_features(tmp_path / "f", crops, blocks, tokens), MuSc(blocks=BLOCKS, degrees=(1,))))
    assert max(range(8), key=lambda number: float(found[number].map.max())) == 5
    assert int(found[5].map.argmax()) == 4
    plain = list(score(_category_features(tmp_path / "g", crops, blocks, tokens), MuSc(blocks=BLOCKS, neighbours=())))
    assert max(range(8), key=lambda number: plain[number].score) == 5
    assert plain[5].score > 2 * max(one.score for one in plain if one.number != 5)


def test_images_of_equal_features_score_nothing(tmp_path: Path) -> None:
    blocks, tokens = _features((1,))
    same = {name: np.repeat(rows, 6, axis=0) for name, rows in blocks.items()}
    found = list(
        score(_category_features(tmp_path / "f", (1,) * 6, same, np.repeat(tokens, 6, axis=0)), MuSc(blocks=BLOCKS))
    )
    assert max(one.score for one in found) < 2e-3
    assert max(float(one.map.max()) for one in found) < 2e-3


def test_a_lone_image_is_an_error_of_one_line(tmp_path: Path) -> None:
    blocks, tokens = _features((2,))
    with pytest.raises(InputError, match=r"0\.png: MuSc needs at least two different images"):
        list(score(_category_features(tmp_path / "f", (2,), blocks, tokens), MuSc(blocks=BLOCKS)))


@pytest.mark.parametrize("degree", [1, 3, 5, 7])
def test_aggregation_is_the_loops_of_the_paper(degree: int) -> None:
    patches = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(degree)) * 3 + 1
    found = aggregate(patches, 4, degree).double()
    for crop in range(2):
        expected = torch.tensor(_lnamd(patches[crop].double().tolist(), degree), dtype=torch.float64)
        torch.testing.assert_close(found[crop], expected, atol=1e-5, rtol=0)


def test_aggregation_is_blind_to_gain_and_offset_of_a_crop() -> None:
    patches = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    changed = patches * torch.tensor([2.0, 5.0, 0.7])[:, None, None] + torch.tensor([1.0, -3.0, 0.0])[:, None, None]
    torch.testing.assert_close(aggregate(changed, 3, 3), aggregate(patches, 3, 3), atol=1e-4, rtol=0)


def _tokens(count: int, offset: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, 6, generator=generator, dtype=torch.float64) + offset, dim=-1)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("neighbours", [(1,), (1, 2, 3), (1, 8, 9), (3, 3), (100,)])
def test_rescoring_is_the_loops_of_the_paper(count: int, neighbours: tuple[int, ...]) -> None:
    scores = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = _tokens(count, 2)
    expected = _rescored_by_loops(scores.tolist(), tokens.tolist(), neighbours)
    assert rescore(scores, tokens, neighbours).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_window_of_one_keeps_the_score() -> None:
    scores = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert rescore(scores, _tokens(7, 0), (1, 1)).tolist() == pytest.approx(scores.tolist(), abs=1e-12)
    equal = torch.ones(7, 1, dtype=torch.float64)
    assert rescore(scores, equal, (1,)).tolist() == pytest.approx(scores.tolist(), abs=1e-12)


def test_a_window_of_all_equal_images_has_their_mean() -> None:
    scores = torch.arange(5, dtype=torch.float64)
    assert rescore(scores, torch.ones(5, 1, dtype=torch.float64), (5, 9)).tolist() == pytest.approx([2.0] * 5)


@pytest.mark.parametrize("change", [lambda s: 3 * s - 1, lambda s: (s - s.min()) / (s.max() - s.min())])
def test_scaling_before_is_scaling_after(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """This shows that scaling to 0..1, as in the public code, does not change the order of the scores."""
    scores = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = change(scores).min(), change(scores).max()
    slope = (high - low) / (scores.max() - scores.min())
    found = rescore(change(scores), _tokens(9, 1), (1, 2, 3))
    expected = slope * (rescore(scores, _tokens(9, 1), (1, 2, 3)) - scores.min()) + low
    torch.testing.assert_close(found, expected)


def test_opposite_images_weigh_nothing() -> None:
    tokens = torch.tensor([[1.0, 0], [-1, 0], [0.6, 0.8]], dtype=torch.float64)
    scores = torch.tensor([1.0, 5, 2], dtype=torch.float64)
    expected = [(1 + 0.6 * 2) / 1.6, 5, (2 + 0.6 * 1) / 1.6]
    assert rescore(scores, tokens, (3,)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [
        MuSc(blocks=(1, 2), neighbours=(1, 2)),
        MuSc(blocks=(1, 2), neighbours=()),
        MuSc2(blocks=(1, 2), references=2),
    ],
)
def test_from_image_files_to_scores_on_disk(tmp_path: Path, settings: MuSc | MuSc2) -> None:
    encoder = tiny_encoder(tmp_path / "model")
    paths = noise_images(tmp_path, [(64, 64), (64, 96), (64, 64), (64, 64)])
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    features, out = tmp_path / "features", tmp_path / "scores"
    classes = settings.reads_class_tokens
    encode_images(paths, digests, encoder, "cpu", features, outputs=settings.outputs, class_tokens=classes)
    score_system(settings, "object", features, None, None, None, paths, encoder, 3, "cpu", out, largest_batch=3)
    scores = SystemScores(out)
    rows = [image.rows for image in FeatureStore(features).images]
    assert rows == [1, 2, 1, 1]
    for number, count in enumerate(rows):
        patches = scores.patch_map(number)
        assert patches.shape == (count, 4, 4)
        assert 0 < patches.min() <= patches.max() <= 2
        if isinstance(settings, MuSc2):
            assert scores.image_score()[number] == patches.max()
