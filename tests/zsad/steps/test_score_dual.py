"""Tests of scoring a category from files to files: a tiny model, images of one to three crops, and a broken image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from medad.base.errors import ConfigError, InputError
from medad.base.storage import file_digest
from tests.zsad.tiny_clip import noise_images, tiny_encoder
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import FeatureStore, read_text
from zsad.config.run import AdaptSettings, EncoderSettings, PromptSettings, ReferenceSettings, ScoreSettings, Variant
from zsad.data.images import crop_image, read_image
from zsad.scorers.dual.adapt import adapt, corrupt, crop_generator
from zsad.scorers.dual.score import score_category
from zsad.scorers.dual.scores_file import Scores
from zsad.scorers.textures import open_textures
from zsad.steps.encode import encode_category_text, encode_images

SIZES = [(40, 40), (40, 60), (64, 64), (32, 96), (50, 50), (90, 60), (33, 33), (40, 60)]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
ALL = ScoreSettings(
    tau=0.07,
    variants=VARIANTS,
    lambda_1=0.7,
    lambda_2=1.3,
    lambda_3=0.9,
    lambda_4=1.7,
    lambda_5=0.4,
    lambda_text=2.1,
    references=ReferenceSettings(count=2, aggregate="mean"),
    batch_size=4,
)
ADAPT = AdaptSettings(learning_rate=0.01)


@dataclass(frozen=True)
class Encoded:
    """Images with the features of images and text."""

    encoder: EncoderSettings
    features: Path
    text: Path
    paths: tuple[Path, ...]
    """Images with features, in the order of the features."""

    def score(self, out: Path, settings: ScoreSettings = ALL, seed: int = 0, **others: Any) -> Scores:
        values: dict[str, Any] = {"paths": self.paths, "encoder": self.encoder, "adapt": ADAPT} | others
        score_category(self.features, self.text, score=settings, seed=seed, device="cpu", out=out, **values)
        return Scores(out)


def _encode(paths: Sequence[Path], encoder: EncoderSettings, text: Path, out: Path) -> Encoded:
    digests = [file_digest(path) for path in paths]
    encode_images(paths, digests, encoder, "cpu", out)
    encoded = {image.sha256 for image in FeatureStore(out).images}
    good = tuple(path for path, digest in zip(paths, digests, strict=True) if digest in encoded)
    return Encoded(encoder, out, text, good)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    root = tmp_path_factory.mktemp("category")
    encoder = tiny_encoder(root / "model", seed=1, batch_size=3)
    encode_category_text("carpet", encoder, PromptSettings(domains=("plain",)), "cpu", root / "text")
    paths = noise_images(root, SIZES)
    paths.insert(3, root / "broken.png")
    paths[3].write_bytes(b"no picture")
    return _encode(paths, encoder, root / "text", root / "features")


@pytest.fixture(scope="module")
def scored(encoded: Encoded, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return encoded.score(tmp_path_factory.mktemp("scores") / "new folder")


def _by_content(scores: Scores, variant: Variant) -> dict[str, tuple[float, np.ndarray]]:
    return {
        image.sha256: (image.image_score[variant], scores.patch_map(i, variant))
        for i, image in enumerate(scores.index.images)
    }


def _assert_equal(ours: Scores, theirs: Scores, variants: Sequence[Variant], atol: float = 2e-5) -> None:
    for variant in variants:
        expected = _by_content(theirs, variant)
        for sha256, (image_score, patch_map) in _by_content(ours, variant).items():
            assert image_score == pytest.approx(expected[sha256][0], abs=atol)
            np.testing.assert_allclose(patch_map, expected[sha256][1], atol=atol)


def test_every_variant_is_the_equations_image_by_image(encoded: Encoded, scored: Scores) -> None:
    store, (t_n, t_a) = FeatureStore(encoded.features), read_text(encoded.text).double().numpy()
    model = Encoder.load(encoded.encoder, torch.device("cpu"))
    rows = {image.sha256: i for i, image in enumerate(store.images)}
    assert [image.sha256 for image in scored.index.images] == list(store.digests)

    def f(tokens: np.ndarray) -> np.ndarray:
        up, down = np.exp(tokens @ t_a / 0.07), np.exp(tokens @ t_n / 0.07)
        return np.asarray(up / (down + up))

    for i, image in enumerate(scored.index.images):
        tokens, n_crops = store.patches(i), store.images[i].rows
        query = tokens.flatten(0, 1).double().numpy()
        a_cls, a_l = float(f(store.class_tokens(i).double().numpy()).mean()), f(query)
        assert len(image.references) == 2
        distances = []
        for reference in image.references:
            memory = store.patches(rows[reference]).flatten(0, 1).double().numpy()
            distances.append([min(1 - float(q @ r) for r in memory) for q in query])
        a_v = np.mean(distances, axis=0)

        # adapt only this image; `adapt` itself has its own tests
        crops = crop_image(read_image(encoded.paths[i]), store.crops(i))
        generators = [crop_generator(0, image.sha256, crop) for crop in range(n_crops)]
        bad = corrupt(crops, generators, model.grid, ADAPT, open_textures(None))
        a_t, a_t_text = (
            adapt(
                tokens.flatten(0, 1)[None],
                model.encode_patches(bad.images).flatten(0, 1)[None],
                bad.mask.flatten()[None],
                torch.from_numpy(target[None]).float(),
                read_text(encoded.text),
                ADAPT,
                0.07,
            )[0].numpy()
            for target in (a_v + a_l, a_l)
        )
        expected: dict[Variant, tuple[float, np.ndarray]] = {
            "text": (a_cls, a_l),
            "text_tta": (0.9 * a_cls + 0.4 * a_t_text.max(), 1.3 * a_t_text),
            "visual": (a_v.max(), a_v),
            "joint": (0.9 * a_cls + 1.7 * a_v.max() + 0.4 * a_l.max(), 0.7 * a_v + 2.1 * a_l),
            "joint_tta": (0.9 * a_cls + 1.7 * a_v.max() + 0.4 * a_t.max(), 0.7 * a_v + 1.3 * a_t),
        }
        for variant, (image_score, patch_map) in expected.items():
            assert scored.image_score(variant)[i] == pytest.approx(image_score, abs=2e-5)
            shape = (n_crops, model.grid, model.grid)
            np.testing.assert_allclose(scored.patch_map(i, variant), patch_map.reshape(shape), atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size_changes_nothing(encoded: Encoded, scored: Scores, tmp_path: Path, batch_size: int) -> None:
    settings = ALL.model_copy(update={"batch_size": batch_size})
    again = encoded.score(tmp_path, settings)
    _assert_equal(again, scored, VARIANTS)
    assert again.index.settings == scored.index.settings, "nothing to tell the two apart"


def test_order_and_names_change_nothing(encoded: Encoded, scored: Scores, tmp_path: Path) -> None:
    moved = []
    for i in (5, 2, 7, 0, 6, 1, 4, 3):
        moved.append(tmp_path / f"another name {i}.png")
        shutil.copy(encoded.paths[i], moved[-1])
    again = _encode(moved, encoded.encoder, encoded.text, tmp_path / "features")
    _assert_equal(again.score(tmp_path / "scores"), scored, VARIANTS)


def test_company_changes_nothing_but_the_references(encoded: Encoded, scored: Scores, tmp_path: Path) -> None:
    some = _encode(encoded.paths[2:5], encoded.encoder, encoded.text, tmp_path / "features")
    _assert_equal(some.score(tmp_path / "scores"), scored, ("text", "text_tta"))


def test_two_runs_write_the_same_bytes(encoded: Encoded, scored: Scores, tmp_path: Path) -> None:
    first, second = encoded.score(tmp_path / "a"), encoded.score(tmp_path / "b")
    assert len(first) == len(second) == len(SIZES)
    for name in ("scores.json", "scores.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["scores.json", "scores.safetensors"]


def test_seeds_change_references_and_anomalies_but_not_the_text(
    encoded: Encoded, scored: Scores, tmp_path: Path
) -> None:
    other = encoded.score(tmp_path, seed=1)
    _assert_equal(other, scored, ("text",))
    assert [image.references for image in other.index.images] != [image.references for image in scored.index.images]
    assert not np.array_equal(other.image_score("text_tta"), scored.image_score("text_tta"))


def test_no_path_or_name_is_written(encoded: Encoded, scored: Scores, tmp_path: Path) -> None:
    encoded.score(tmp_path)
    index = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert list(index) == ["schema", "seed", "tau", "settings", "images", "problems"]
    assert index["schema"] == "adflows zsad scores 1"
    assert ".png" not in json.dumps(index)


def test_text_alone_needs_no_files_no_other_image_and_no_model(encoded: Encoded, tmp_path: Path) -> None:
    alone = _encode(encoded.paths[:1], encoded.encoder, encoded.text, tmp_path / "features")
    text = ScoreSettings(variants=("text",), references=ReferenceSettings(count=0))
    nowhere = EncoderSettings(model="local-dir:nowhere")
    scores = alone.score(tmp_path / "scores", text, paths=None, encoder=nowhere)
    assert scores.index.images[0].references == ()
    assert 0 < scores.image_score("text")[0] < 1
    with pytest.raises(ValueError, match="variant joint was not scored, only text"):
        scores.patch_map(0, "joint")
    with pytest.raises(InputError, match=r"0\.png: this is the only image, but it needs a reference; add images"):
        alone.score(tmp_path / "scores", ALL)


def test_as_many_references_as_there_are(encoded: Encoded, tmp_path: Path) -> None:
    settings = ScoreSettings(variants=("visual",), references=ReferenceSettings(count=64))
    scores = encoded.score(tmp_path, settings, paths=None)
    for image in scores.index.images:
        assert {image.sha256, *image.references} == {other.sha256 for other in scores.index.images}
        assert len(image.references) == len(SIZES) - 1


def test_a_file_that_changed_costs_only_its_own_score(encoded: Encoded, scored: Scores, tmp_path: Path) -> None:
    others = encoded.score(tmp_path / "scores", paths=(encoded.paths[1], *encoded.paths[1:]))
    [problem] = others.problems
    assert problem.rule == "is not the image that the features were computed from"
    assert problem.sha256 == scored.digests[0]
    assert list(others.digests) == list(scored.digests)[1:]
    np.testing.assert_array_equal(others.image_score("joint_tta"), scored.image_score("joint_tta")[1:])


def test_progress_ends_at_the_number_of_images(encoded: Encoded, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    encoded.score(tmp_path, ScoreSettings(variants=("joint",)), on_progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1] == (len(SIZES), len(SIZES))


def test_what_does_not_fit_the_features_is_one_line(encoded: Encoded, tmp_path: Path) -> None:
    save_file({"text": np.eye(2, 9, dtype=np.float32)}, tmp_path / "text.safetensors")
    with pytest.raises(InputError, match=r"text features of shape \(2, 9\) do not fit patches of 24 numbers"):
        Encoded(encoded.encoder, encoded.features, tmp_path, encoded.paths).score(tmp_path / "scores")

    with pytest.raises(InputError, match="features were made with another model"):
        encoded.score(tmp_path / "scores", encoder=tiny_encoder(tmp_path / "other", seed=9))

    with pytest.raises(ValueError, match="8 images' files"):
        encoded.score(tmp_path / "scores", paths=encoded.paths[1:])
    with pytest.raises(ConfigError, match="min_mask_patches = 17 of 16 patches"):
        encoded.score(tmp_path / "scores", adapt=AdaptSettings(min_mask_patches=17))
    assert not (tmp_path / "scores" / "scores.json").exists()


def test_damaged_scores_are_one_line(encoded: Encoded, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    encoded.score(whole, ScoreSettings(variants=("visual",)))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    with pytest.raises(InputError, match="no such file"):
        Scores(tmp_path / "nowhere")
    cut = copy("cut")
    (cut / "scores.json").write_text('{"schema": "adflows zsad scores 1"', encoding="utf-8")
    with pytest.raises(InputError, match="not an index of scores"):
        Scores(cut)
    short = copy("short")
    content = (short / "scores.safetensors").read_bytes()
    (short / "scores.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="damaged or incomplete"):
        Scores(short).patch_map(0, "visual")
    fewer = copy("fewer")
    save_file({"a_v": np.zeros((5, 16), np.float32)}, fewer / "scores.safetensors")
    assert Scores(fewer).patch_map(0, "visual").shape == (1, 4, 4)
    for i in (3, 7):  # only some rows of the fourth image exist
        with pytest.raises(InputError, match=r"fewer rows than its index says|damaged or incomplete"):
            Scores(fewer).patch_map(i, "visual")
    (fewer / "scores.safetensors").unlink()
    with pytest.raises(InputError, match="no such file"):
        Scores(fewer)
