"""Tests of AnomalyDINO against its formulas in plain loops, of its foreground, and of turned copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import zsad
from medad.base.errors import ConfigError, InputError
from tests.zsad.feature_sets import DIM, GRID, category_features, random_tensors, write_features
from tests.zsad.learned_sets import cosine
from zsad.clip.feature_store import FeatureStore, output_file
from zsad.config.run import EncoderSettings
from zsad.data.images import write_png
from zsad.data.turns import turn_image
from zsad.scorers.anomalydino.foreground import foreground
from zsad.scorers.anomalydino.score import score
from zsad.scorers.anomalydino.settings import AnomalyDino
from zsad.scorers.interface import mean_of_top
from zsad.steps.encode import encode_images

CROPS, WIDTH = (1, 2, 1), 9
OUTPUTS = {"patches": (GRID**2, DIM), "tokens": (GRID**2, WIDTH), "block-2": (1 + GRID**2, WIDTH)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_features(tmp_path_factory.mktemp("query") / "f", CROPS, random_tensors(sum(CROPS), OUTPUTS, seed=1))


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_features(tmp_path_factory.mktemp("shots") / "f", (2, 1), random_tensors(3, OUTPUTS, seed=50), "ab")


@pytest.mark.parametrize(
    ("settings", "output", "first"),
    [
        (AnomalyDino(shots=2), "patches", 0),
        (AnomalyDino(shots=2, blocks="last", top_share=0.2), "tokens", 0),
        (AnomalyDino(shots=2, blocks=(2,), top_share=0.5), "block-2", 1),
    ],
)
def test_each_patch_is_compared_with_all_patches_of_all_normal_images(
    store: FeatureStore, shots: FeatureStore, settings: AnomalyDino, output: str, first: int
) -> None:
    def read(features: FeatureStore, number: int) -> list[list[float]]:
        return [token for crop in features.output(number, output)[:, first:].double().tolist() for token in crop]

    memory = [token for number in range(len(shots)) for token in read(shots, number)]
    scored = list(score(category_features(store, shots=shots), settings))
    assert [one.number for one in scored] == [0, 1, 2]
    for one, crops in zip(scored, CROPS, strict=True):
        distances = [min(1 - cosine(token, other) for other in memory) for token in read(store, one.number)]
        np.testing.assert_allclose(one.map.flatten(), distances, atol=1e-5, rtol=0)
        assert one.map.shape == (crops, GRID, GRID)
        count = max(1, int(settings.top_share * len(distances)))
        assert one.score == pytest.approx(np.mean(sorted(distances, reverse=True)[:count]), abs=1e-5)


def test_a_normal_image_is_compared_with_the_others(store: FeatureStore, tmp_path: Path) -> None:
    """Leave one out: the same as without the image in the memory."""
    given = category_features(store, shots=store)
    for number, one in enumerate(score(given, AnomalyDino(shots=3))):
        others = [i for i in range(len(store)) if i != number]
        rest = torch.cat([unit_patches(store, i) for i in others])
        expected = 1 - (unit_patches(store, number) @ rest.T).amax(1)
        torch.testing.assert_close(one.map.flatten(), expected.clamp_min(0), atol=1e-5, rtol=0)


def test_the_only_normal_image_has_no_score(store: FeatureStore, tmp_path: Path) -> None:
    tensors = random_tensors(1, OUTPUTS, seed=7)
    alone = write_features(tmp_path / "alone", (1,), tensors)
    (one,) = score(category_features(alone, shots=alone), AnomalyDino())
    assert one.problem == "the only normal image has no other to be compared with"


def unit_patches(store: FeatureStore, number: int) -> torch.Tensor:
    return torch.nn.functional.normalize(store.output(number, "patches").flatten(0, 1), dim=-1)


def test_products_in_bf16_change_distances_little(store: FeatureStore, shots: FeatureStore) -> None:
    given = category_features(store, shots=shots)
    exact, low = (list(score(given, AnomalyDino(shots=2, cosines=format_))) for format_ in ("fp32", "bf16"))
    for one, other in zip(exact, low, strict=True):
        assert (one.map - other.map).abs().max() < 0.01, "few channels, so rounding counts more than in a real encoder"
        assert not torch.equal(one.map, other.map)


def test_more_normal_images_never_increase_a_distance(store: FeatureStore, shots: FeatureStore, tmp_path: Path) -> None:
    first = {name: values[:2] for name, values in random_tensors(3, OUTPUTS, seed=50).items()}
    fewer = write_features(tmp_path / "f", (2,), first, "a")
    many, few = (list(score(category_features(store, shots=memory), AnomalyDino(shots=1))) for memory in (shots, fewer))
    for one, other in zip(many, few, strict=True):
        assert (one.map <= other.map + 1e-6).all()


def test_without_normal_images_it_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    none = write_features(tmp_path / "none", (), random_tensors(0, OUTPUTS, seed=0))
    with pytest.raises(InputError, match="AnomalyDINO needs at least one normal image"):
        list(score(category_features(store, shots=none), AnomalyDino()))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 9.0), (0.01, 9.0), (0.2, 8.5), (0.29, 8.5), (1.0, 4.5)])
def test_the_top_share_is_rounded_down_and_has_a_value(share: float, expected: float) -> None:
    assert mean_of_top(torch.arange(10.0).reshape(2, 5), share) == expected


def _scene(place: slice, object_value: float, seed: int = 0) -> torch.Tensor:
    """Return patches of 10 x 10: a square object, with another value of one channel than the background."""
    values = torch.zeros(10, 10, 5)
    values[..., 1:] = 0.01 * torch.randn(10, 10, 4, generator=torch.Generator().manual_seed(seed))
    values[place, place, 0] = object_value
    return values.reshape(100, 5)


@pytest.mark.parametrize("value", [20.0, -20.0])
def test_the_foreground_is_the_object_in_the_centre_and_one_patch_around(value: float) -> None:
    expected = np.zeros((10, 10), dtype=bool)
    expected[2:8, 2:8] = True
    np.testing.assert_array_equal(foreground(_scene(slice(3, 7), value), 0.0), expected)
    np.testing.assert_array_equal(foreground(_scene(slice(3, 7), value), 10.0), expected)


def test_the_sign_changes_if_the_centre_is_nearly_empty() -> None:
    # an object in the corner that covers 1 of the 36 patches of the centre: all else is taken for the object
    mask = foreground(_scene(slice(0, 3), 20.0), 0.0)
    assert mask[4:, 4:].all()
    assert not mask[0, 0]


def test_background_has_no_distance(tmp_path: Path) -> None:
    tensors = random_tensors(1, {"tokens": (GRID**2, WIDTH)}, seed=3)
    name = output_file("tokens")
    tokens = 0.01 * tensors[name].reshape(GRID, GRID, WIDTH)
    tokens[1:3, 1:3, 0] += 5  # dilation grows this square of 2 x 2 to all 4 x 4 patches
    tokens[..., 1] += 1
    everything = write_features(tmp_path / "a", (1,), tensors | {name: tokens.reshape(1, -1, WIDTH)})
    shots = write_features(tmp_path / "b", (1,), random_tensors(1, {"tokens": (GRID**2, WIDTH)}, seed=9), "b")
    given = category_features(everything, shots=shots)
    plain, masked = (
        next(iter(score(given, AnomalyDino(blocks="last", mask_background=masking)))) for masking in (False, True)
    )
    torch.testing.assert_close(masked.map, plain.map)
    given = category_features(everything, shots=shots)
    (none,) = score(given, AnomalyDino(blocks="last", mask_background=True, mask_threshold=1e6))
    assert none.map.max() == none.score == 0


def test_quarter_turns_are_exact_and_keep_the_size() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    for quarter in range(4):
        np.testing.assert_array_equal(turn_image(image, 90.0 * quarter), np.rot90(image, quarter))
    assert turn_image(image[:5], 30.0).shape == (5, 7, 3)


def test_a_turned_even_image_stays_even() -> None:
    image = np.full((20, 31, 3), (10, 200, 90), dtype=np.uint8)
    np.testing.assert_array_equal(turn_image(image, 45.0), image)


def test_turned_copies_are_further_rows_of_their_image(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_png(tmp_path / "one.png", image)
    write_png(tmp_path / "quarter.png", np.ascontiguousarray(np.rot90(image)))
    encoder = EncoderSettings(model="embedded")
    encode_images([tmp_path / "one.png"], ["a" * 64], encoder, "cpu", tmp_path / "turned", turns=4)
    encode_images([tmp_path / "quarter.png"], ["b" * 64], encoder, "cpu", tmp_path / "alone")
    turned, alone = FeatureStore(tmp_path / "turned"), FeatureStore(tmp_path / "alone")
    assert turned.patches(0).shape[0] == 4
    torch.testing.assert_close(turned.patches(0)[1], alone.patches(0)[0])


def test_from_python_all_normal_images_and_their_turns_are_in_the_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    for number, image in enumerate(images):
        write_png(tmp_path / f"normal/{number}.png", image)
    turned = tmp_path / "turned.png"
    write_png(turned, np.ascontiguousarray(np.rot90(images[1])))
    encoder = EncoderSettings(model="embedded")
    (known,) = zsad.score(tmp_path / "normal/1.png", "anomalydino", tmp_path / "normal", encoder=encoder)
    assert known.score > 1e-3, "it is not compared with itself"
    one = tmp_path / "normal/1.png"
    (plain,) = zsad.score(turned, AnomalyDino(), one, encoder=encoder)
    (quarter,) = zsad.score(turned, AnomalyDino(turns=4), one, encoder=encoder)
    assert quarter.score < 1e-5 < plain.score
    with pytest.raises(ConfigError, match="AnomalyDINO: 1 shots need as many different normal images, but there are 0"):
        zsad.score(turned, "anomalydino", encoder=encoder)
