"""Tests of APRIL-GAN's scores and loss against its formulas in plain Python loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medad.base.errors import ConfigError, InputError
from tests.zsad.learned_sets import category_features, cosine, dice, focal, shares, square, up
from zsad.clip.feature_store import FeatureStore, read_text
from zsad.config.run import EncoderSettings
from zsad.scorers.april_gan.score import AprilGanLearner, score
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.learned import Batch, Weights
from zsad.scorers.weights_file import Checkpoint, CheckpointMetadata
from zsad.steps.results import Source
from zsad.steps.train import gather_crops

SETTINGS = AprilGan(blocks=(1, 3), scale=20.0)
BOTH = AprilGan(blocks=(1, 3), scale=20.0, map_share=0.5)
SIZE = 32


@pytest.fixture(scope="module")
def source(sources: tuple[Source[Path], ...]) -> Source[Path]:
    return sources[1]


def _weights(learner: AprilGanLearner) -> Weights:
    return learner.initial(torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def learner(source: Source[Path]) -> AprilGanLearner:
    assert source.text is not None
    return AprilGanLearner(SETTINGS, read_text(source.text)[None], 32)


@pytest.fixture(scope="module")
def checkpoint(learner: AprilGanLearner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "checkpoint.safetensors"
    Checkpoint(CheckpointMetadata(system=SETTINGS, encoder=None, paths=None), _weights(learner)).write(path)
    return path


def _logits(tokens: torch.Tensor, weights: Weights, output: str, text: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return scale * cosine of each projected patch with the normal and the anomalous text, without class token."""
    matrix, bias = weights[f"{output}.weight"].double().tolist(), weights[f"{output}.bias"].double().tolist()
    normal, anomalous = text.double().tolist()
    found: tuple[list[float], list[float]] = ([], [])
    for token in tokens[1:].double().tolist():
        joint = [sum(w * x for w, x in zip(row, token, strict=True)) + b for row, b in zip(matrix, bias, strict=True)]
        found[0].append(SETTINGS.scale * cosine(joint, normal))
        found[1].append(SETTINGS.scale * cosine(joint, anomalous))
    return found


def _upsampled_shares(
    tokens: torch.Tensor, weights: Weights, output: str, text: torch.Tensor
) -> tuple[list[list[float]], list[list[float]]]:
    """Upsample both logits first, then compute the softmax pixel by pixel."""
    low, high = (up(square(logits), SIZE, align_corners=True) for logits in _logits(tokens, weights, output, text))
    both = [[shares(low[y][x], high[y][x]) for x in range(SIZE)] for y in range(SIZE)]
    return [[n for n, _ in row] for row in both], [[a for _, a in row] for row in both]


def test_scores_are_the_formulas(
    source: Source[Path], learned_encoder: EncoderSettings, learner: AprilGanLearner, checkpoint: Path
) -> None:
    given = category_features(source, learned_encoder, checkpoint)
    assert given.text is not None
    weights, normal, anomalous = _weights(learner), *given.text.double().tolist()
    scored = {one.number: one for one in score(given, SETTINGS)}
    halved = {one.number: one for one in score(given, BOTH)}
    assert sorted(scored) == list(range(len(given.store)))
    for number in (0, 2):  # images with one crop and with two crops
        classes = []
        tops = []
        for crop, token in enumerate(given.store.class_tokens(number).double().tolist()):
            classes.append(shares(20 * cosine(token, normal), 20 * cosine(token, anomalous))[1])
            maps = [
                _upsampled_shares(given.store.output(number, output)[crop], weights, output, given.text)[1]
                for output in ("block-1", "block-3")
            ]
            expected = np.array(maps).sum(axis=0)
            np.testing.assert_allclose(scored[number].map[crop].numpy(), expected, atol=1e-5)
            tops.append(float(expected.max()))
        share = sum(classes) / len(classes)
        assert scored[number].score == pytest.approx(share, abs=1e-5)
        assert halved[number].score == pytest.approx(0.5 * share + 0.5 * max(tops) / 2, abs=1e-5)
        assert torch.equal(halved[number].map, scored[number].map)


def _copies(source: Source[Path], kept: slice) -> FeatureStore:
    """Return some images under other digests, because a normal image is never compared with itself."""
    store = FeatureStore(source.features)
    named = [image.model_copy(update={"sha256": f"{i}" * 64}) for i, image in enumerate(store.images)]
    store.images = tuple(named[kept])
    return store


@pytest.mark.parametrize("stretch", [False, True])
def test_few_shot_adds_the_distances_of_each_block_to_the_normal_images(
    source: Source[Path], learned_encoder: EncoderSettings, learner: AprilGanLearner, checkpoint: Path, stretch: bool
) -> None:
    settings = AprilGan(blocks=(1, 3), scale=20.0, shots=1, stretch_map=stretch)
    zero = category_features(source, learned_encoder, checkpoint)
    shots = _copies(source, slice(1, 3))  # two normal images of the memory, one of them with two crops
    found = list(score(replace(zero, shots=shots), settings))
    plain = list(score(zero, SETTINGS))
    tops = [float(one.map.max()) for one in found]
    for number in (0, 2):
        for crop in range(len(zero.store.rows_of(number))):
            added = np.zeros((SIZE, SIZE))
            for output in ("block-1", "block-3"):
                memory = [
                    token
                    for i in range(2)
                    for part in shots.output(i, output)[:, 1:].double().tolist()
                    for token in part
                ]
                tokens = zero.store.output(number, output)[crop, 1:].double().tolist()
                distances = [min(1 - cosine(token, other) for other in memory) for token in tokens]
                added += np.array(up(square(distances), SIZE, align_corners=True))
            np.testing.assert_allclose(found[number].map[crop], plain[number].map[crop].numpy() + added, atol=1e-5)
        low, high = (min(tops), max(tops)) if stretch else (0, 6)
        expected = 0.5 * plain[number].score + 0.5 * (tops[number] - low) / (high - low)
        assert found[number].score == pytest.approx(expected, abs=1e-5)


def test_one_image_has_nothing_to_stretch_over(
    source: Source[Path], learned_encoder: EncoderSettings, checkpoint: Path
) -> None:
    given = category_features(source, learned_encoder, checkpoint)
    given.store.images = given.store.images[:1]
    shots = _copies(source, slice(1))
    (one,) = score(replace(given, shots=shots), AprilGan(blocks=(1, 3), scale=20.0, shots=1, stretch_map=True))
    (plain,) = score(given, SETTINGS)
    assert one.score == pytest.approx(plain.score / 2)


def test_with_the_texts_exchanged_the_map_is_its_complement(
    source: Source[Path], learned_encoder: EncoderSettings, checkpoint: Path
) -> None:
    given = category_features(source, learned_encoder, checkpoint)
    assert given.text is not None
    turned = replace(given, text=given.text.flip(0))
    for one, other in zip(score(given, SETTINGS), score(turned, SETTINGS), strict=True):
        torch.testing.assert_close(one.map + other.map, torch.full_like(one.map, 2.0), atol=1e-5, rtol=0)
        assert one.score + other.score == pytest.approx(1, abs=1e-5)


def test_the_loss_is_focal_and_dice_of_each_block(source: Source[Path], learner: AprilGanLearner) -> None:
    data, store, weights = gather_crops([source]), FeatureStore(source.features), _weights(learner)
    chosen = [0, len(data.crops) - 1, 1]
    batch = data.batch(chosen, learner.reads, torch.device("cpu"))
    expected = 0.0
    masks = [data.mask(data.crops[i]).astype(float).tolist() for i in chosen]
    assert source.text is not None
    text = read_text(source.text)
    for output in ("block-1", "block-3"):
        pairs = [
            _upsampled_shares(store.output(data.crops[i].number, output)[data.crops[i].place], weights, output, text)
            for i in chosen
        ]
        normal, anomalous = [n for n, _ in pairs], [a for _, a in pairs]
        expected += focal(normal, anomalous, masks) + dice(anomalous, masks)
    assert learner.loss(weights, batch).item() == pytest.approx(expected, abs=1e-5)


def test_each_crop_meets_the_text_of_its_own_source(source: Source[Path], learner: AprilGanLearner) -> None:
    text = learner.texts[0]
    two = AprilGanLearner(SETTINGS, torch.stack([text, text.flip(0)]), 32)
    weights = _weights(learner)
    batch = gather_crops([source]).batch([0, 1], learner.reads, torch.device("cpu"))

    def of(sources: list[int]) -> float:
        mixed = Batch(batch.class_tokens, batch.patches, batch.masks, torch.tensor(sources))
        return two.loss(weights, mixed).item()

    mean = (of([0, 0]) + of([1, 1])) / 2
    assert (of([0, 1]) + of([1, 0])) / 2 == pytest.approx(mean, rel=1e-5)
    assert of([0, 1]) != pytest.approx(of([1, 0]), rel=1e-3)


def test_an_extreme_scale_gives_a_finite_loss(source: Source[Path], learner: AprilGanLearner) -> None:
    steep = AprilGanLearner(AprilGan(blocks=(1, 3), scale=1e4), learner.texts, 32)
    weights = {name: value.requires_grad_() for name, value in _weights(learner).items()}
    loss = steep.loss(weights, gather_crops([source]).batch([0, 1, 2], steep.reads, torch.device("cpu")))
    loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(loss.item())
    for value in weights.values():
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


def test_without_a_checkpoint_it_says_so(source: Source[Path], learned_encoder: EncoderSettings) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        next(score(category_features(source, learned_encoder, None), SETTINGS))


def test_features_without_its_blocks_are_refused(
    source: Source[Path], learned_encoder: EncoderSettings, checkpoint: Path
) -> None:
    with pytest.raises(InputError, match="made without output block-2"):
        next(score(category_features(source, learned_encoder, checkpoint), AprilGan(blocks=(2, 3))))
