"""Compare `zsad.score` with the steps of the flows, with a tiny model, on images of one and two crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import zsad
from medad.base.errors import ConfigError, InputError
from medad.base.storage import file_digest
from tests.zsad.learned_sets import OUTPUTS, make_source
from tests.zsad.tiny_clip import noise_images, tiny_encoder
from zsad.clip.feature_store import FeatureStore
from zsad.clip.register import BestEncoder
from zsad.config.run import EncoderSettings, PromptSettings
from zsad.config.system_base import Training
from zsad.config.systems import METHODS, System
from zsad.data.images import merge_maps, resize_map
from zsad.data.shots import draw_shots
from zsad.scorers.anomalydino.settings import AnomalyDino
from zsad.scorers.anovl.settings import AnoVl
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.clip.settings import Clip
from zsad.scorers.dual.score import score_category
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.musc.settings import MuSc, MuSc2
from zsad.scorers.stored_scores import open_scores
from zsad.scorers.winclip.settings import WinClip
from zsad.steps.encode import encode_category_text, encode_images
from zsad.steps.methods import default_settings
from zsad.steps.score import score_system
from zsad.steps.train import train_system

SIZES_HW = ((40, 40), (40, 60), (64, 64), (32, 40), (40, 40))
"""Sizes of the images. The second has two crops, and the last is a copy of the first."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderSettings:
    return tiny_encoder(tmp_path_factory.mktemp("model") / "tiny", seed=2, batch_size=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "wood"
    noise_images(folder, SIZES_HW[:-1])
    (folder / "10.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return noise_images(tmp_path_factory.mktemp("normal"), [(40, 40)] * 3, seed=1)


def by_steps(
    system: System, paths: Sequence[Path], shots: Sequence[Path], encoder: EncoderSettings, root: Path
) -> dict[str, tuple[float, np.ndarray[Any, Any]]]:
    """Return score and map by digest, computed by the steps as in the flows: each digest once, in rising order."""
    distinct = {file_digest(path): path for path in paths}
    ordered = sorted(distinct)
    files = [distinct[digest] for digest in ordered]
    encode_images(files, ordered, encoder, "cpu", root / "features", outputs=system.outputs)
    text = memory = None
    if system.prompts is not None:
        text = root / "text"
        encode_category_text("wood", encoder, PromptSettings(style=system.prompts), "cpu", text)
    if shots:
        memory = root / "shots"
        digests = sorted(file_digest(path) for path in shots)
        found = {file_digest(path): path for path in shots}
        encode_images([found[d] for d in digests], digests, encoder, "cpu", memory, outputs=system.outputs)
    variant: str = "system"
    if isinstance(system, DualImage):
        assert text is not None
        variant = system.variant_names[-1]
        paths_or_none = files if system.adaptation else None
        score_category(
            root / "features", text, paths_or_none, encoder, system.score, system.adapt, 0, "cpu", root / "out"
        )
    else:
        score_system(
            system, "wood", root / "features", text, memory, None, files, encoder, 0, "cpu", root / "out",
            largest_batch=3,
        )  # fmt: skip
    store, scores = FeatureStore(root / "features"), open_scores(root / "out")
    aligned = scores.align_corners
    maps = [merge_maps(scores.patch_map(n, variant), store.crops(n), align_corners=aligned) for n in range(len(store))]
    return {
        image.sha256: (float(scores.image_score(variant)[n]), resize_map(maps[n], (image.height, image.width)))
        for n, image in enumerate(store.images)
    }


@pytest.mark.parametrize(
    ("method", "system"),
    [
        ("clip", Clip()),
        ("winclip", WinClip()),
        ("anovl", AnoVl()),
        ("musc", MuSc(blocks=(1, 2, 3))),  # the quarters of a depth of three blocks
        ("musc_2", MuSc2(blocks=(1, 2, 3))),
        ("dual", DualImage()),
        (
            DualImage(adaptation=True, lambda_1=0.5, lambda_4=2.0),
            DualImage(adaptation=True, lambda_1=0.5, lambda_4=2.0),
        ),
    ],
)
def test_scores_equal_those_of_the_steps(
    method: str | System, system: System, images: Path, encoder: EncoderSettings, tmp_path: Path
) -> None:
    expected = by_steps(system, sorted(images.iterdir()), (), encoder, tmp_path)
    found = zsad.score(images, method, encoder=encoder, device="cpu")
    assert [one.path.name for one in found] == ["0.png", "1.png", "2.png", "3.png", "10.png"], "natural order"
    for one, size in zip(found, SIZES_HW, strict=True):
        score, scored = expected[file_digest(one.path)]
        assert one.score == score
        assert one.map.dtype == np.float32
        assert one.map.shape == size
        np.testing.assert_array_equal(one.map, scored)


@pytest.mark.parametrize(("shots", "used"), [(0, 3), (2, 2)])
def test_normal_images_are_the_memory(
    shots: int, used: int, images: Path, normal: list[Path], encoder: EncoderSettings, tmp_path: Path
) -> None:
    """Check that all normal images are used without `shots`, and otherwise as many as `shots`."""
    chosen = draw_shots(map(file_digest, normal), 0, used)
    expected = by_steps(
        WinClip(shots=used),
        sorted(images.iterdir()),
        [path for path in normal if file_digest(path) in chosen],
        encoder,
        tmp_path,
    )
    for one in zsad.score(images, WinClip(shots=shots), [*normal, normal[0]], encoder=encoder, device="cpu"):
        score, scored = expected[file_digest(one.path)]
        assert one.score == score
        np.testing.assert_array_equal(one.map, scored)


def test_shots_depend_on_contents_and_seed_alone() -> None:
    contents = [f"{number:02}" for number in range(20)]
    chosen = draw_shots(contents, 0, 5)
    assert chosen == draw_shots([*reversed(contents), *contents], 0, 5)
    assert draw_shots(contents, 0, 9)[:5] == chosen
    assert draw_shots(contents, 1, 5) != chosen
    assert sorted(draw_shots(contents, 1, 99)) == contents


def test_results_come_in_the_order_given(images: Path, encoder: EncoderSettings) -> None:
    order: list[str | Path] = [images / "2.png", str(images / "0.png"), images / "10.png", images / "2.png"]
    found = zsad.score(order, "clip", encoder=encoder, device="cpu")
    assert [one.path for one in found] == [Path(path) for path in order]
    assert found[0].score == found[3].score
    assert found[1].score == found[2].score, "two names of the same content"
    [alone] = zsad.score(images / "2.png", "clip", encoder=encoder, device="cpu")
    assert alone.score == pytest.approx(found[0].score, abs=1e-6)


def test_words_for_the_category_reach_the_prompts(images: Path, encoder: EncoderSettings, tmp_path: Path) -> None:
    folder = tmp_path / "wood"
    folder.mkdir()
    (folder / "1.png").write_bytes((images / "1.png").read_bytes())
    (tmp_path / "1.png").write_bytes((images / "1.png").read_bytes())
    [by_folder] = zsad.score(folder, "clip", encoder=encoder)
    [by_words] = zsad.score(tmp_path / "1.png", "clip", category="wood", encoder=encoder)
    [others] = zsad.score(folder, "clip", category="metal nut", encoder=encoder)
    assert by_folder.score == by_words.score != others.score


@pytest.mark.parametrize(("adaptation", "left"), [(False, "text"), (True, "text_tta")])
def test_a_single_image_is_scored_by_the_text_alone(
    adaptation: bool, left: Literal["text", "text_tta"], images: Path, encoder: EncoderSettings, tmp_path: Path
) -> None:
    """Check this also for an image and its copy, because an image is not its own reference."""
    alone = DualImage(adaptation=adaptation, references={"count": 0})
    assert alone.variant_names[-1] == left
    [(score, scored)] = by_steps(alone, [images / "0.png"], (), encoder, tmp_path).values()
    for given in ([images / "0.png"], [images / "0.png", images / "10.png"]):
        with pytest.warns(UserWarning, match=rf"no second image .*variant {left}\)"):
            found = zsad.score(given, DualImage(adaptation=adaptation), encoder=encoder, category="wood")
        for one in found:
            assert one.score == score
            np.testing.assert_array_equal(one.map, scored)
    with pytest.raises(InputError, match="MuSc needs at least two different images"):
        zsad.score(images / "0.png", "musc", encoder=encoder)


def test_a_learned_method_takes_its_checkpoint(tmp_path: Path, encoder: EncoderSettings, images: Path) -> None:
    training = Training(epochs=1, batch_size=4, learning_rate=1e-3)
    system = AprilGan(blocks=(1, 3), training=training)
    assert set(system.outputs) <= set(OUTPUTS)
    source = make_source(tmp_path, "cloth", encoder)
    train_system(system, [source], encoder, "cpu", tmp_path / "out")
    for method in ("april_gan", "anomalyclip", system):
        with pytest.raises(ConfigError, match=r"must be trained first: .* `adflows zsad train \w+ --on FOLDER`"):
            zsad.score(images, method, encoder=encoder)
    trained = system.model_copy(update={"checkpoint": str(tmp_path / "out" / "checkpoint.safetensors")})
    found = zsad.score(images, trained, encoder=encoder)
    assert all(0 <= one.score <= 1 for one in found)
    assert len({one.score for one in found}) == len(SIZES_HW) - 1


def test_without_an_encoder_it_is_the_best_of_the_machine(
    images: Path, normal: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the last resort, and a machine with a DINO, here of random weights."""
    monkeypatch.setattr("zsad.clip.register.hub_file", lambda hub: None)
    monkeypatch.setenv("ADFLOWS_MODELS", str(tmp_path / "none"))
    embedded = EncoderSettings(model="embedded")
    assert values(zsad.score(images)) == values(zsad.score(images, default_settings(embedded, few_shot=False)))
    assert values(zsad.score(images, "musc_2")) == values(
        zsad.score(images, MuSc2(blocks=(2, 3, 5, 6)), encoder=embedded)
    )

    random = EncoderSettings(model="dino_vits8", seed=3, size_px=32)
    monkeypatch.setattr("zsad.scoring.best_encoder", lambda: BestEncoder(random, ""))
    squashed = random.model_copy(update={"fit": "squash", "interpolation": "bicubic"})
    assert values(zsad.score(images)) == values(zsad.score(images, "musc", encoder=squashed))
    few_shot = default_settings(random, few_shot=True).model_copy(update={"shots": len(normal)})
    assert isinstance(few_shot, AnomalyDino)
    assert values(zsad.score(images, normal=normal)) == values(zsad.score(images, few_shot, normal, encoder=squashed))


def values(found: Sequence[zsad.ImageScore]) -> list[float]:
    return [one.score for one in found]


def test_errors_in_settings_are_one_line(images: Path, normal: list[Path], encoder: EncoderSettings) -> None:
    def said(*arguments: Any, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            zsad.score(images, *arguments, **({"encoder": encoder} | options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    unknown = said("winklip")
    assert "no such method" in unknown
    assert all(name in unknown for name in METHODS)
    assert "CLIP cannot use normal images; methods that can: " in said("clip", normal)
    assert "4 shots need as many different normal images, but there are 3" in said(WinClip(shots=4), normal)
    assert "1 shots need as many different normal images, but there are 0" in said(WinClip(shots=1))
    assert "block 12 is requested" in said(MuSc(blocks=(12,)))
    assert "clipseg" in said("segmentation")
    assert "encoder: set exactly one of" in said("clip", encoder="ViT-B-16")


def test_an_unusable_image_is_reported(images: Path, encoder: EncoderSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: no such file or folder"):
        zsad.score([images, tmp_path / "none.png"], "clip", encoder=encoder)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "another.png").write_bytes(b"no picture either")
    for given in (tmp_path / "broken.png", [images / "0.png", tmp_path / "broken.png", tmp_path / "another.png"]):
        with pytest.raises(InputError, match=r"broken\.png: not a PNG"):
            zsad.score(given, "clip", encoder=encoder)
    with pytest.raises(InputError, match="none given"):
        zsad.score([], "clip", encoder=encoder)


def test_the_methods_are_those_of_the_configurations() -> None:
    assert set(METHODS) == {
        *("clip", "clip_ac", "winclip", "anovl", "musc", "musc_2", "dual", "anomalydino"),
        *("april_gan", "anomalyclip", "segmentation"),
    }
