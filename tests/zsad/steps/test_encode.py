"""Tests of features on disk against the output of the encoder, for any order and batch size, with broken images."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medad.base.errors import InputError
from tests.zsad.tiny_clip import noise_images, tiny_encoder
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import FeatureStore, read_text
from zsad.clip.prompts import ensemble
from zsad.config.run import EncoderSettings, PromptSettings
from zsad.data.images import Crops, crop_image, plan_crops, read_image
from zsad.steps.encode import encode_category_text, encode_images

SIZES_HW = ((32, 32), (50, 50), (32, 48), (90, 30), (40, 400), (1, 1), (20, 5000))
GOOD = 5
"""Sizes of the images. The last two are refused: too small, and too long for `max_crops`."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EncoderSettings:
    return tiny_encoder(tmp_path_factory.mktemp("model") / "tiny", batch_size=3, min_side_px=8, max_crops=20)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    made = [path.rename(folder / f"patient {path.name}") for path in noise_images(folder, SIZES_HW)]
    broken = folder / "patient broken.png"
    broken.write_bytes(made[1].read_bytes()[:500])
    return [*made[:2], broken, *made[2:]]


def _digests(paths: Sequence[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.fixture(scope="module")
def encoded(paths: list[Path], settings: EncoderSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "deep" / "down"
    seen: list[tuple[int, int]] = []
    encode_images(paths, _digests(paths), settings, "cpu", out, lambda done, total: seen.append((done, total)))
    assert seen == [(number + 1, len(paths)) for number in range(len(paths))]
    return out


def test_rows_are_what_the_encoder_gives_for_each_crop(
    encoded: Path, paths: list[Path], settings: EncoderSettings
) -> None:
    encoder = Encoder.load(settings, torch.device("cpu"))
    store = FeatureStore(encoded)
    by_digest = dict(zip(_digests(paths), paths, strict=True))
    assert len(store) == GOOD
    row = 0
    for number, image in enumerate(store.images):
        pixels = read_image(by_digest[image.sha256])
        height, width = pixels.shape[:2]
        crops = plan_crops(height, width, 32, 20)
        tokens = encoder.encode(crop_image(pixels, crops))
        torch.testing.assert_close(store.class_tokens(number), tokens.class_token, atol=1e-5, rtol=0)
        torch.testing.assert_close(store.patches(number), tokens.patches, atol=1e-5, rtol=0)
        assert store.crops(number) == crops
        assert (image.height, image.width) == (height, width)
        assert store.rows_of(number) == range(row, row := row + len(crops.offsets))
    assert [image.rows for image in store.images] == [1, 1, 2, 3, 10]
    # plain .npy files can be read without FeatureStore
    assert np.load(encoded / "output-patches.npy").shape == (17, 16, 24)
    assert np.load(encoded / "class_tokens.npy").dtype == np.float32


def test_squashed_images_have_one_row_each(paths: list[Path], settings: EncoderSettings, tmp_path: Path) -> None:
    squashed = settings.model_copy(update={"fit": "squash", "interpolation": "bicubic"})
    encode_images(paths, _digests(paths), squashed, "cpu", tmp_path)
    encoder, store = Encoder.load(settings, torch.device("cpu")), FeatureStore(tmp_path)
    by_digest = dict(zip(_digests(paths), paths, strict=True))
    for number, image in enumerate(store.images):
        resized = Image.fromarray(read_image(by_digest[image.sha256])).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)[None]
        torch.testing.assert_close(store.patches(number), encoder.encode(pixels).patches, atol=1e-5, rtol=0)
        assert store.crops(number) == Crops((32, 32), ((0, 0),), 32, "bicubic")
    assert {image.rows for image in store.images} == {1}
    assert len(store) == GOOD + 1  # the image that is too long for crops is used


def test_broken_images_are_named_by_digest_and_the_rest_go_on(encoded: Path, paths: list[Path]) -> None:
    store = FeatureStore(encoded)
    digests = dict(zip(_digests(paths), paths, strict=True))
    rules = {digests[problem.sha256].name: problem.rule for problem in store.problems}
    assert set(rules) == {"patient broken.png", "patient 5.png", "patient 6.png"}
    assert "1 x 1" in rules["patient 5.png"]
    assert "crops" in rules["patient 6.png"]
    text = (encoded / "index.json").read_text(encoding="utf-8")
    assert "patient" not in text
    assert str(paths[0].parent) not in text
    assert json.loads(text)["schema"] == "adflows zsad features 2"


def test_order_and_batch_size_change_nothing_but_the_order(
    encoded: Path, paths: list[Path], settings: EncoderSettings, tmp_path: Path
) -> None:
    backwards = paths[::-1]
    encode_images(backwards, _digests(backwards), settings.model_copy(update={"batch_size": 64}), "cpu", tmp_path)
    one, other = FeatureStore(encoded), FeatureStore(tmp_path)
    assert other.digests == one.digests[::-1]
    for number in range(GOOD):
        reversed_number = GOOD - 1 - number
        torch.testing.assert_close(other.patches(reversed_number), one.patches(number), atol=1e-5, rtol=0)
        torch.testing.assert_close(other.class_tokens(reversed_number), one.class_tokens(number), atol=1e-5, rtol=0)


def test_class_tokens_are_left_out_if_they_are_not_wanted(
    encoded: Path, paths: list[Path], settings: EncoderSettings, tmp_path: Path
) -> None:
    encode_images(paths, _digests(paths), settings, "cpu", tmp_path, class_tokens=False)
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", "output-patches.npy"}
    whole, some = FeatureStore(encoded), FeatureStore(tmp_path)
    assert some.digests == whole.digests
    for number in range(GOOD):
        torch.testing.assert_close(some.patches(number), whole.patches(number), atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="without class tokens"):
        some.class_tokens(0)


def test_no_image_at_all_is_an_empty_store(settings: EncoderSettings, paths: list[Path], tmp_path: Path) -> None:
    encode_images([], [], settings, "cpu", tmp_path / "none")
    assert len(FeatureStore(tmp_path / "none")) == 0
    broken = [paths[2]]
    encode_images(broken, _digests(broken), settings, "cpu", tmp_path / "broken")
    assert len(FeatureStore(tmp_path / "broken").problems) == 1


def test_reading_holds_one_image_at_a_time(tmp_path: Path, settings: EncoderSettings) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    count = 300
    encode_images([path] * count, [f"{i:064x}" for i in range(count)], settings, "cpu", tmp_path / "out")
    store = FeatureStore(tmp_path / "out")
    one_image_bytes = 16 * 24 * 4
    tracemalloc.start()
    try:
        for number in range(count):
            store.patches(number)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * one_image_bytes < count * one_image_bytes


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("index.json", 0.5, "not an index of image features"),
        ("index.json", 0.0, "not an index of image features"),
        ("output-patches.npy", 0.9, "cut short"),
        ("output-patches.npy", 0.0, r"not a \.npy file"),
        ("class_tokens.npy", None, "no such file"),
        ("index.json", None, "no such file"),
    ],
)
def test_damaged_features_are_told(encoded: Path, name: str, keep: float | None, message: str, tmp_path: Path) -> None:
    for file in encoded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if keep is not None:
        (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=message):
        FeatureStore(tmp_path)


def test_another_schema_is_told(encoded: Path, tmp_path: Path) -> None:
    index = json.loads((encoded / "index.json").read_text(encoding="utf-8"))
    (tmp_path / "index.json").write_text(json.dumps(index | {"schema": "adflows zsad features 9"}), encoding="utf-8")
    with pytest.raises(InputError, match="not an index"):
        FeatureStore(tmp_path)


def test_files_of_another_run_do_not_pass_for_these(encoded: Path, tmp_path: Path) -> None:
    for file in encoded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    np.save(tmp_path / "output-patches.npy", np.zeros((16, 16, 24), np.float32))
    with pytest.raises(InputError, match="the index expects float32 of shape"):
        FeatureStore(tmp_path)


def test_text_features_and_their_report(settings: EncoderSettings, tmp_path: Path) -> None:
    encode_category_text("wood", settings, PromptSettings(), "cpu", tmp_path / "text")
    prompts = ensemble("wood", PromptSettings())
    expected = Encoder.load(settings, torch.device("cpu")).encode_ensemble(prompts)
    torch.testing.assert_close(read_text(tmp_path / "text"), expected)
    assert list(load_file(tmp_path / "text" / "text.safetensors")) == ["text"]
    report = json.loads((tmp_path / "text" / "text.json").read_text(encoding="utf-8"))
    assert report["counts"] == {"normal": 462, "anomalous": 462}
    assert report["prompts"]["anomalous"] == list(prompts.anomalous)
    assert report["domains"] == ["industrial", "textural", "surface"]
    assert not report["random_weights"]
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path)
