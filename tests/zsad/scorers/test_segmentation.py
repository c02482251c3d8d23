"""Tests of the complete segmentation-model system with small models, against the paper's rules in loops."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from pydantic import ValidationError
from torch.nn.functional import normalize

from medad.base.errors import ConfigError, InputError
from medad.base.storage import file_digest
from tests.zsad.learned_sets import cosine
from tests.zsad.tiny_clip import tiny_encoder
from tests.zsad.tiny_segmenters import write_clipseg, write_salient, write_sam
from zsad.clip.encoder import Encoder
from zsad.clip.models import path_digest
from zsad.config.run import EncoderSettings
from zsad.data.images import Crops, plan_crops, resize_map
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.scores_file import SystemScores
from zsad.scorers.segmentation.foreground import Component, find_components
from zsad.scorers.segmentation.models import ClipSeg, Salient, Sam
from zsad.scorers.segmentation.prompts import LOCALISING_PROMPTS, tile_ensemble
from zsad.scorers.segmentation.score import Models, cut_crops, foreground, image_score, mean_alignment, tile_scores
from zsad.scorers.segmentation.settings import SegmentationModels
from zsad.scorers.segmentation.tiles import Tile, cut_tile, place_tiles
from zsad.scorers.stored_scores import open_scores
from zsad.steps.encode import encode_images
from zsad.steps.score import score_system

CPU = torch.device("cpu")
Picture = UInt8[ndarray, "H W 3"]


def _image(height: int, width: int, seed: int) -> Picture:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[height // 5 : height // 2, width // 8 : width // 2] = 240
    return image


IMAGES = (_image(48, 48, 0), _image(60, 100, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write all models, two images of different sizes, and their features."""
    folder = tmp_path_factory.mktemp("segmentation")
    tiny_encoder(folder / "clip")
    write_clipseg(folder / "clipseg")
    write_sam(folder / "sam", seed=11, gain=4.0)
    write_salient(folder / "salient.pt")
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{number}.png")
    _encode(folder, (0, 1))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(_encoder_settings(folder), CPU)


def _encoder_settings(folder: Path) -> EncoderSettings:
    return EncoderSettings(model=f"local-dir:{folder / 'clip'}")


def _paths(folder: Path, order: Sequence[int]) -> list[Path]:
    return [folder / f"{number}.png" for number in order]


def _encode(folder: Path, order: Sequence[int]) -> Path:
    out = folder / f"features{''.join(map(str, order))}"
    paths = _paths(folder, order)
    encode_images(paths, [file_digest(path) for path in paths], _encoder_settings(folder), "cpu", out)
    return out


def _settings(folder: Path, **other: Any) -> SegmentationModels:
    """Return settings with which the random models find a few segments. Tiles have at least 20 px."""
    values = {
        "clipseg": str(folder / "clipseg"),
        "sam": str(folder / "sam"),
        "sam_points_per_side": 3,
        "sam_min_iou": 0.5,
        "sam_min_stability": 0.3,
        "sam_max_box_iou": 1.0,
        "salient": str(folder / "salient.pt"),
        "trust_salient": True,
        "salient_px": 64,
        "covered": 0.5,
        "tile_px": 20,
        "many_parts": 1,
        "foreground_px": 64,
    }
    return SegmentationModels(**(values | other))


def _score(folder: Path, out: Path, order: Sequence[int] = (0, 1), batch_size: int = 16, **other: Any) -> SystemScores:
    score_system(
        _settings(folder, **other),
        "metal_nut",
        _encode(folder, order),
        None,
        None,
        None,
        _paths(folder, order),
        _encoder_settings(folder),
        seed=0,
        device="cpu",
        out=out,
        largest_batch=batch_size,
    )
    scores = open_scores(out)
    assert isinstance(scores, SystemScores)
    return scores


def _mean_cosine(token: Sequence[float], prompts: Sequence[Sequence[float]]) -> float:
    return sum(cosine(token, prompt) for prompt in prompts) / len(prompts)


PromptFeatures = tuple[list[list[float]], list[list[float]]]
"""Features of each normal prompt, and of each anomalous prompt."""


def _prompt_features(encoder: Encoder, words: str) -> PromptFeatures:
    prompts = tile_ensemble(words)
    return encoder.encode_text(prompts.normal).tolist(), encoder.encode_text(prompts.anomalous).tolist()


def _tile_score(image: Picture, tile: Tile, encoder: Encoder, prompts: PromptFeatures, tau: float) -> float:
    """Return the tile score as in the paper: mean alignment with each kind of prompt, then a softmax over the two."""
    resized = Image.fromarray(cut_tile(image, tile)).resize((32, 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    token = encoder.encode(pixels).class_token[0].double().tolist()
    normal, anomalous = (math.exp(_mean_cosine(token, side) / tau) for side in prompts)
    return anomalous / (normal + anomalous)


def _expected(image: Picture, encoder: Encoder, settings: SegmentationModels) -> tuple[float, Any, list[int]]:
    """Return score and map of an image, tile by tile and pixel by pixel, and the number of tiles per component."""
    height, width = image.shape[:2]
    models, prompts = Models.load(settings, CPU), _prompt_features(encoder, "metal nut")
    localising = models.clipseg.embed(LOCALISING_PROMPTS)
    tile_maps, components, counts = [], [], []
    for component in foreground(image, models, settings):
        own = []
        for tile in place_tiles(component, (height, width), min_side_px=20, long_aspect=1.5, many_parts=1):
            value = _tile_score(image, tile, encoder, prompts, settings.tau)
            maps = models.clipseg.segment(cut_tile(image, tile), localising).double().numpy()
            harmonic = np.array(
                [[len(maps) / sum(1 / prompt[y, x] for prompt in maps) for x in range(32)] for y in range(32)]
            )
            tile_maps.append((tile, value * resize_map(harmonic, (tile.side, tile.side))))
            own.append(value)
        components.append(sum(own) / len(own))
        counts.append(len(own))
    components.sort(reverse=True)
    highest = components[: max(1, len(components) // 4)]
    full = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            values = [
                values[y - tile.top, x - tile.left]
                for tile, values in tile_maps
                if tile.top <= y < tile.top + tile.side and tile.left <= x < tile.left + tile.side
            ]
            full[y, x] = sum(values) / len(values) if values else 0
    return sum(highest) / len(highest), full, counts


@pytest.fixture(scope="module")
def scores(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SystemScores:
    return _score(folder, tmp_path_factory.mktemp("scores"))


def test_scores_and_maps_are_those_of_the_rules_in_loops(folder: Path, encoder: Encoder, scores: SystemScores) -> None:
    tiles = []
    for number, image in enumerate(IMAGES):
        expected, full, counts = _expected(image, encoder, _settings(folder))
        tiles.append(counts)
        assert scores.image_score()[number] == pytest.approx(expected, rel=1e-5)
        crops = plan_crops(image.shape[0], image.shape[1], 32, 64)
        canvas = resize_map(full.astype(np.float32), crops.canvas_hw)
        ours = scores.patch_map(number)
        assert ours.shape == (len(crops.offsets), 32, 32)
        for one, (top, left) in zip(ours, crops.offsets, strict=True):
            assert np.allclose(one, canvas[top : top + 32, left : left + 32], rtol=1e-5, atol=1e-6)
    # the test needs several components, and one with several tiles
    assert max(map(len, tiles)) > 3
    assert max(map(max, tiles)) > 1
    assert [len(scores.patch_map(number)) for number in (0, 1)] == [1, 2]


def test_scores_depend_neither_on_the_order_nor_on_the_batch(
    folder: Path, scores: SystemScores, tmp_path: Path
) -> None:
    second = _score(folder, tmp_path, order=(1, 0), batch_size=1)
    assert scores.digests == second.digests[::-1]
    assert np.allclose(scores.image_score(), second.image_score()[::-1], rtol=1e-5)
    for number in (0, 1):
        assert np.allclose(scores.patch_map(number), second.patch_map(1 - number), rtol=1e-5, atol=1e-7)


def test_maps_lie_between_0_and_the_highest_tile(folder: Path, tmp_path: Path) -> None:
    scores = _score(folder, tmp_path, top_share=1e-6)
    for number in (0, 1):
        values = scores.patch_map(number)
        assert values.min() >= 0
        assert values.max() <= 1
        assert 0 <= scores.image_score()[number] <= 1


def test_alignment_is_averaged_and_not_the_embedding() -> None:
    # an image halfway between the normal prompts and one of two anomalous prompts with different meanings
    text = torch.eye(3)
    normal, anomalous = text[:1].repeat(2, 1), text[1:]
    token = normalize(torch.tensor([1.0, 1.0, 0.0]), dim=0)
    prompts = torch.stack([mean_alignment(normal), mean_alignment(anomalous)])
    # the mean cosines are 1/sqrt(2) and 1/sqrt(8)
    expected = 1 / (1 + math.exp((1 / math.sqrt(2) - 1 / math.sqrt(8)) / 0.07))
    assert text_scores(token, prompts, 0.07).item() == pytest.approx(expected, rel=1e-5)
    # the cosine of the normalised mean embedding would be 1/2 instead
    assert text_scores(token, normalize(prompts, dim=-1), 0.07).item() > 2 * expected


def test_tile_scores_are_mean_cosines_and_a_softmax(encoder: Encoder) -> None:
    ensemble = tile_ensemble("cashew")
    text = torch.stack([mean_alignment(encoder.encode_text(side)) for side in (ensemble.normal, ensemble.anomalous)])
    tiles = [Tile(0, 0, 48), Tile(5, 9, 20), Tile(-3, 11, 60), Tile(20, 20, 25), Tile(1, 2, 31)]
    ours = tile_scores(IMAGES[0], tiles, encoder, text, 0.07, batch_size=2)
    prompts = _prompt_features(encoder, "cashew")
    expected = [_tile_score(IMAGES[0], tile, encoder, prompts, 0.07) for tile in tiles]
    assert ours == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 4) for value in ours}) > 1


@pytest.mark.parametrize(
    ("scores", "counts", "share", "expected"),
    [
        # components 0.3, 0.9, 0.2, 0.5: the highest quarter is one component
        ([0.2, 0.4, 0.9, 0.1, 0.2, 0.3, 0.5], [2, 1, 3, 1], 0.25, 0.9),
        ([0.2, 0.4, 0.9, 0.1, 0.2, 0.3, 0.5], [2, 1, 3, 1], 0.5, 0.7),
        # the score of one component with many tiles is their mean, not their maximum
        ([0.1, 0.8, 0.3], [3], 0.25, 0.4),
    ],
)
def test_image_score_by_hand(scores: list[float], counts: list[int], share: float, expected: float) -> None:
    assert image_score(scores, counts, share) == pytest.approx(expected)


def _models(segments: Sequence[Any], folder: Path, seen: list[tuple[int, int]]) -> Models:
    """Return models with a SAM that returns these segments and a real salient model."""

    def generator(image: Image.Image, **_: Any) -> dict[str, Sequence[Any]]:
        seen.append(image.size)
        return {"masks": segments}

    return Models(ClipSeg(None, None, CPU), Sam(generator), Salient.load(folder / "salient.pt", CPU, size_px=64))


def test_the_foreground_of_a_large_image_is_found_in_a_smaller_one(folder: Path) -> None:
    image = np.zeros((200, 400, 3), dtype=np.uint8)
    image[40:120, 80:240] = 255
    small = np.zeros((50, 100), dtype=bool)
    small[10:30, 20:60] = True
    seen: list[tuple[int, int]] = []
    settings = _settings(folder, foreground_px=100, covered=0.8)
    assert foreground(image, _models([small], folder, seen), settings) == (Component(40, 80, 120, 240, parts=1),)
    assert seen == [(100, 50)]


def test_the_foreground_of_a_small_image_is_found_in_itself(folder: Path) -> None:
    image = np.zeros((50, 100, 3), dtype=np.uint8)
    image[10:30, 20:60] = 255
    inside, outside = (np.zeros((50, 100), dtype=bool) for _ in range(2))
    inside[12:28, 25:50] = True
    outside[35:50] = True
    seen: list[tuple[int, int]] = []
    settings = _settings(folder, foreground_px=100, covered=0.8)
    models = _models([outside, inside], folder, seen)
    assert foreground(image, models, settings) == (Component(12, 25, 28, 50, parts=1),)
    assert seen == [(100, 50)]


def test_without_foreground_the_image_is_one_tile(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    scores = _score(folder, tmp_path, sam_min_iou=1e9)
    assert find_components([], np.zeros((60, 100), dtype=bool), 0.8) == (Component(0, 0, 60, 100, 0),)
    for number, tile in enumerate((Tile(0, 0, 48), Tile(-20, 0, 100))):
        expected = _tile_score(IMAGES[number], tile, encoder, _prompt_features(encoder, "metal nut"), 0.07)
        assert scores.image_score()[number] == pytest.approx(expected, rel=1e-5)


def test_crops_are_cut_out_of_the_canvas() -> None:
    canvas = np.arange(4 * 7, dtype=np.float32).reshape(4, 7)
    cut_out = cut_crops(canvas, Crops((4, 7), ((0, 0), (0, 3)), 4))
    assert cut_out.tolist() == [canvas[:, :4].tolist(), canvas[:, 3:].tolist()]


@pytest.mark.parametrize("name", ["clipseg", "sam", "salient"])
def test_a_model_that_is_not_named_is_one_line(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"needs {name}") as caught:
        Models.load(_settings(folder, **{name: None}), CPU)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["clipseg", "sam", "salient"])
def test_a_model_that_is_not_there_is_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(InputError) as caught:
        Models.load(_settings(folder, **{name: str(missing)}), CPU)
    assert caught.value.path == missing
    assert len(str(caught.value).splitlines()) == 1


def test_the_step_passes_a_models_error_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        _score(folder, tmp_path / "out", sam=str(tmp_path / "missing"))
    assert caught.value.path == tmp_path / "missing"
    with pytest.raises(ConfigError, match="needs salient"):
        _score(folder, tmp_path / "out", salient=None)


def test_a_models_digest_is_of_its_files_and_not_of_where_they_lie(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for one in (first, second):
        (one / "deep").mkdir(parents=True)
        (one / "x").write_bytes(b"1")
        (one / "deep" / "y").write_bytes(b"2")
    digest = path_digest(first)
    assert digest == path_digest(second)
    (second / "deep" / "y").write_bytes(b"3")
    assert digest != path_digest(second)
    (first / "x").rename(first / "z")
    assert digest != path_digest(first)
    assert path_digest(first / "z") == f"sha256:{hashlib.sha256(b'1').hexdigest()}"
    with pytest.raises(InputError):
        path_digest(tmp_path / "missing")


def test_a_program_is_not_loaded_without_leave() -> None:
    with pytest.raises(ValidationError, match="a program, which runs when it is loaded"):
        SegmentationModels(salient="net.pt")
    assert SegmentationModels(salient="net.pt", trust_salient=True).salient == "net.pt"
