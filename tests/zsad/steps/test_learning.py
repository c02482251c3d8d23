"""Tests of training on features: it learns, depends only on seed and content, survives a kill; and of checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medad.base.errors import ConfigError, InputError
from medad.base.progress import Progress
from tests.killed import TrainingKilled, kill_at
from tests.zsad.learned_sets import category_features, encoder_settings, make_source
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import FeatureStore
from zsad.config.run import EncoderSettings, EvaluationSettings
from zsad.config.system_base import Training
from zsad.data.labelled import LabelledImage
from zsad.scorers.anomalyclip import score as anomalyclip
from zsad.scorers.anomalyclip.score import AnomalyClipLearner
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.april_gan import score as april_gan
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.interface import CategoryFeatures
from zsad.scorers.learned import Batch, Weights
from zsad.scorers.weights_file import (
    CHECKPOINT,
    Checkpoint,
    import_official,
    read_checkpoint,
    trained_weights,
    with_trained_values,
)
from zsad.steps import train as learning
from zsad.steps.evaluate import CategoryEvaluation, evaluate_category
from zsad.steps.results import Source
from zsad.steps.score import score_system
from zsad.steps.train import CURVE, TrainingData, fit, gather_crops, make_learner, train_system

CPU = torch.device("cpu")
SHORT = Training(epochs=3, batch_size=5, learning_rate=1e-2, seed=1)
APRIL = AprilGan(blocks=(1, 3), scale=20.0, training=SHORT)
ANOMALY = AnomalyClip(context_tokens=3, deep_tokens=2, depth=2, training=SHORT)
System = AprilGan | AnomalyClip
EACH = pytest.mark.parametrize("system", [APRIL, ANOMALY], ids=["april_gan", "anomalyclip"])


Train = Callable[..., Weights]
Given = Callable[[Path], CategoryFeatures]


@pytest.fixture(scope="module")
def train(sources: tuple[Source[Path], ...], learned_encoder: EncoderSettings) -> Train:
    """Return a function that trains a system, by default on both categories with their encoder."""

    def run(
        system: System,
        out: Path,
        sources: tuple[Source[Path], ...] = sources,
        encoder: EncoderSettings = learned_encoder,
        **more: Any,
    ) -> Weights:
        train_system(system, sources, encoder, "cpu", out, **more)
        return load_file(out / CHECKPOINT)

    return run


@pytest.fixture(scope="module")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train each system without interruption and return its folder."""
    folders: dict[str, Path] = {system.system: tmp_path_factory.mktemp(system.system) for system in (APRIL, ANOMALY)}
    for system in (APRIL, ANOMALY):
        train(system, folders[system.system])
    return folders


@pytest.fixture(scope="module")
def given(sources: tuple[Source[Path], ...], learned_encoder: EncoderSettings) -> Given:
    """Return a function from a checkpoint to the first category's features, for scoring."""
    return lambda checkpoint: category_features(sources[0], learned_encoder, checkpoint)


def _curve(folder: Path) -> Any:
    return json.loads((folder / CURVE).read_text(encoding="utf-8"))


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _with(system: System, **training: Any) -> System:
    return system.model_copy(update={"training": system.training.model_copy(update=training)})


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@EACH
def test_the_loss_falls(system: System, train: Train, tmp_path: Path) -> None:
    long = _with(system, epochs=15)
    train(long, tmp_path)
    curve = _curve(tmp_path)
    per_epoch = curve["steps_per_epoch"]
    assert len(curve["loss"]) == 15 * per_epoch
    first, last = (np.mean(curve["loss"][part]) for part in (slice(per_epoch), slice(-per_epoch, None)))
    assert last < 0.9 * first


@EACH
def test_squares_are_found_in_images_never_seen(
    system: System,
    train: Train,
    sources: tuple[Source[Path], ...],
    learned_encoder: EncoderSettings,
    tmp_path: Path,
) -> None:
    """Train, score and evaluate as the flow does. Random weights have no meaning for words, so use one category."""
    own = sources[1]
    train(_with(system, epochs=40), tmp_path, (own,))
    unseen = make_source(tmp_path, own.name, learned_encoder, seed=5)
    weights, no_paths = tmp_path / CHECKPOINT, list[Path]()
    score_system(
        system, own.name, unseen.features, unseen.text, None, weights, no_paths, learned_encoder, 0, "cpu", tmp_path
    )
    evaluate_category(unseen.items, unseen.features, tmp_path, ["system"], EvaluationSettings(), tmp_path)
    pixel = CategoryEvaluation.load(tmp_path).variants["system"].pixel
    assert pixel is not None
    assert pixel.auroc is not None
    assert pixel.auroc > 0.85


@EACH
def test_the_encoder_does_not_move(
    system: System, sources: tuple[Source[Path], ...], learned_encoder: EncoderSettings
) -> None:
    data = gather_crops(sources)
    learner = make_learner(system, sources, data, learned_encoder, CPU)
    frozen = learner.encoder if isinstance(learner, AnomalyClipLearner) else Encoder.load(learned_encoder, CPU)
    before = _digest(frozen.model)
    features = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(sources[0].features.iterdir())]
    start = learner.initial(torch.Generator().manual_seed(0))
    fitted = fit(learner, data, SHORT, CPU)
    assert _digest(frozen.model) == before
    assert [hashlib.sha256(path.read_bytes()).digest() for path in sorted(sources[0].features.iterdir())] == features
    assert all(parameter.grad is None for parameter in frozen.model.parameters())
    assert fitted.weights.keys() == start.keys()
    assert not any(torch.equal(fitted.weights[name], start[name]) for name in start)


@EACH
def test_weights_are_a_function_of_seed_and_content(
    system: System, train: Train, trained: dict[str, Path], sources: tuple[Source[Path], ...], tmp_path: Path
) -> None:
    first = load_file(trained[system.system] / CHECKPOINT)
    torch.manual_seed(2)
    turned = tuple(dataclasses.replace(source, items=source.items[::-1]) for source in sources[::-1])
    assert _same(train(system, tmp_path / "turned", turned), first)
    other = train(_with(system, seed=2), tmp_path / "other")
    assert not any(torch.equal(first[name], other[name]) for name in first)


@EACH
@pytest.mark.parametrize("step", [2, 4, 5, 8, 11])
def test_a_killed_training_goes_on_to_the_same_weights(
    system: System,
    step: int,
    train: Train,
    trained: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 16 crops and four steps per epoch: kill within an epoch, and at its end just before the state is saved."""
    monkeypatch.setattr(learning, "PROGRESS_SECONDS", 0.0)
    state, killed, whole = tmp_path / "kept" / "state.pt", tmp_path / "killed", trained[system.system]

    def kill(progress: Progress) -> None:
        assert (progress.epoch, progress.epochs, progress.steps) == ((progress.step - 1) // 4 + 1, 3, 12)
        kill_at(step)(progress)

    with pytest.raises(TrainingKilled):
        train(system, killed, checkpoint=state, on_progress=kill)
    assert not (killed / CHECKPOINT).exists()
    assert _same(train(system, killed, checkpoint=state), load_file(whole / CHECKPOINT))
    assert not state.exists()
    assert _curve(killed)["loss"] == _curve(whole)["loss"]
    assert _curve(whole)["resumed_at_epoch"] == 0
    assert _curve(killed)["resumed_at_epoch"] == (step - 1) // 4


def test_a_state_of_another_training_or_a_damaged_one_is_not_resumed(
    train: Train, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "PROGRESS_SECONDS", 0.0)
    state = tmp_path / "state.pt"
    with pytest.raises(TrainingKilled):
        train(APRIL, tmp_path / "killed", checkpoint=state, on_progress=kill_at(5))
    content = state.read_bytes()
    slower = _with(APRIL, learning_rate=1e-3)
    expected = train(slower, tmp_path / "slower")
    assert _same(train(slower, tmp_path / "resumed", checkpoint=state), expected)
    state.write_bytes(content[:200])
    again = train(APRIL, tmp_path / "again", checkpoint=state)
    assert _curve(tmp_path / "again")["resumed_at_epoch"] == 0
    assert _same(again, load_file(trained["april_gan"] / CHECKPOINT))


@EACH
def test_parts_of_a_batch_add_up(system: System, train: Train, tmp_path: Path) -> None:
    # only one step: Adam's rounding differences grow with the number of steps
    one = _with(system, epochs=1, batch_size=100, learning_rate=1e-3)
    whole = train(one, tmp_path / "whole")
    parts = train(one, tmp_path / "parts", largest_batch=4)
    losses = [_curve(tmp_path / name)["loss"] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-5, rtol=0)


def test_a_training_that_diverges_says_so(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"APRIL-GAN: the loss became NaN or infinite in epoch 2; lower"):
        train(_with(APRIL, learning_rate=1e38, epochs=3, batch_size=100), tmp_path)


ABLATIONS: dict[str, dict[str, Any]] = {
    "object-aware": {"prompt": "object_aware"},
    "global alone": {"losses": ("global",)},
    "local alone": {"losses": ("local",)},
    "no deep tokens": {"deep_tokens": 0},
    "prompt length 6": {"context_tokens": 6},
    "blocks": {"blocks": (2, 3)},
    "full stop": {"full_stop": True},
}


@pytest.mark.parametrize("change", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_ablations_of_anomalyclip_train_and_score(
    change: dict[str, Any], train: Train, given: Given, tmp_path: Path
) -> None:
    system = AnomalyClip.model_validate({**ANOMALY.model_dump(), **change})
    weights = train(_with(system, epochs=6), tmp_path)
    losses = _curve(tmp_path)["loss"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert ("deep" in weights) == bool(system.deep_tokens)
    assert weights["normal"].shape == (system.context_tokens, 16)
    scored = list(anomalyclip.score(given(tmp_path / CHECKPOINT), system))
    assert all(0 <= one.score <= 1 for one in scored)


@pytest.mark.parametrize("attention", ["vv", "qq", "kk"])
def test_kinds_of_dpam_train_each_on_its_own_features(
    attention: str, train: Train, learned_model: Path, tmp_path: Path
) -> None:
    encoder = encoder_settings(learned_model, vv_attention=attention)
    source = make_source(tmp_path, "bolt", encoder)
    train(ANOMALY, tmp_path / "out", (source,), encoder)
    list(anomalyclip.score(category_features(source, encoder, tmp_path / "out" / CHECKPOINT), ANOMALY))
    other = encoder_settings(learned_model, vv_attention="kk" if attention == "qq" else "qq")
    with pytest.raises(InputError, match=f"trained with an encoder with vv_attention {attention}, the settings say"):
        next(anomalyclip.score(category_features(source, other, tmp_path / "out" / CHECKPOINT), ANOMALY))


def test_each_crop_has_its_own_part_of_the_mask(sources: tuple[Source[Path], ...]) -> None:
    data = gather_crops(sources[:1])
    store = FeatureStore(sources[0].features)
    masks = {item.sha256: item for item in sources[0].items}
    assert len(data.crops) == sum(image.rows for image in store.images)
    assert data.images == 6
    for crop in data.crops:
        image = store.images[crop.number]
        item = masks[image.sha256]
        assert item.mask is not None
        whole = np.array(Image.open(item.mask)) > 0
        top, left = image.offsets[crop.place]
        ours = data.mask(crop)
        for y in range(32):
            for x in range(32):
                # nearest neighbour: the pixel of the mask that contains the centre of the canvas's pixel
                row = int((top + y + 0.5) * image.height / image.canvas[0])
                column = int((left + x + 0.5) * image.width / image.canvas[1])
                assert ours[y, x] == (whole[row, column] if item.anomalous else False)


def test_what_cannot_be_used_is_left_out_and_noted(
    train: Train, sources: tuple[Source[Path], ...], tmp_path: Path
) -> None:
    source = sources[0]
    items = list(source.items)
    black, small = tmp_path / "black.png", tmp_path / "small.png"
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(black)
    Image.fromarray(np.full((5, 5), 255, np.uint8)).save(small)
    items[0] = dataclasses.replace(items[0], anomalous=None)
    items[1] = dataclasses.replace(items[1], mask=black)
    items[3] = dataclasses.replace(items[3], mask=None)
    with_stranger = [*items, LabelledImage("stranger", "0" * 64, small, True, "square", small)]
    train(APRIL, tmp_path / "out", (dataclasses.replace(source, items=with_stranger),))
    curve = _curve(tmp_path / "out")
    assert curve["images"] == 3
    assert {each["sha256"]: each["rule"].split()[-1] for each in curve["left_out"]} == {
        items[1].sha256: "black",
        items[3].sha256: "mask",
    }
    items[1] = dataclasses.replace(items[1], mask=small)
    left_out = {
        each["sha256"]: each["rule"] for each in gather_crops([dataclasses.replace(source, items=items)]).left_out
    }
    assert "the mask is 5 x 5 pixels" in left_out[items[1].sha256]


def test_sets_that_teach_nothing_are_refused(train: Train, sources: tuple[Source[Path], ...], tmp_path: Path) -> None:
    source = sources[0]
    for wanted, missing in ((True, "normal image"), (False, "anomalous image with a mask")):
        some = [item for item in source.items if item.anomalous is wanted]
        with pytest.raises(InputError, match=f"contains no {missing} to learn from"):
            gather_crops([dataclasses.replace(source, items=some)])
    with pytest.raises(ConfigError, match="needs text features"):
        train(APRIL, tmp_path, (dataclasses.replace(source, text=None),))
    with pytest.raises(InputError, match="without output block-2"):
        train(APRIL.model_copy(update={"blocks": (2,)}), tmp_path)
    other = encoder_settings(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="made with another encoder"):
        train(ANOMALY, tmp_path, encoder=other)
    mixed = (source, make_source(tmp_path, "bolt", other))
    with pytest.raises(InputError, match="made with another encoder than other categories"):
        train(ANOMALY, tmp_path, mixed)


@EACH
def test_a_checkpoint_is_read_as_it_was_written_and_holds_no_path(
    system: System, train: Train, sources: tuple[Source[Path], ...], tmp_path: Path
) -> None:
    named = system.model_copy(update={"label": "Mrs Smith", "checkpoint": "/home/smith/x", "encoder": "smith"})
    train(named, tmp_path)
    content = (tmp_path / CHECKPOINT).read_bytes()
    assert b"smith" not in content.lower()
    assert str(tmp_path).encode() not in content
    found = read_checkpoint(tmp_path / CHECKPOINT)
    assert found.metadata.system == system
    assert found.metadata.encoder == FeatureStore(sources[0].features).index.identity
    found.write(tmp_path / "again.safetensors")
    again = read_checkpoint(tmp_path / "again.safetensors")
    assert again.metadata == found.metadata
    assert _same(again.weights, found.weights)


def _rewrite(path: Path, change: Callable[[Weights], Weights]) -> None:
    found = read_checkpoint(path)
    Checkpoint(found.metadata, change(found.weights)).write(path)


def _refused(given: CategoryFeatures, system: System) -> str:
    score = april_gan.score if isinstance(system, AprilGan) else anomalyclip.score
    with pytest.raises(InputError) as caught:
        next(score(given, system))  # type: ignore[arg-type]
    assert caught.value.path == given.checkpoint
    assert "\n" not in str(caught.value)
    return caught.value.rule


def test_checkpoints_that_do_not_belong_are_refused_in_one_line(
    trained: dict[str, Path], given: Given, tmp_path: Path
) -> None:
    learned, prompts = (
        Path(shutil.copy(trained[name] / CHECKPOINT, tmp_path / f"{name}.safetensors"))
        for name in ("april_gan", "anomalyclip")
    )
    whole = learned.read_bytes()

    assert _refused(given(prompts), APRIL) == "was trained for AnomalyCLIP, not for APRIL-GAN"
    assert _refused(given(learned), ANOMALY) == "was trained for APRIL-GAN, not for AnomalyCLIP"
    fewer = APRIL.model_copy(update={"blocks": (3,)})
    assert _refused(given(learned), fewer) == "was trained with blocks 1 3, the settings say 3"
    for change, rule in (
        ({"prompt": "object_aware"}, "prompt object_agnostic, the settings say object_aware"),
        ({"context_tokens": 4}, "context_tokens 3, the settings say 4"),
        ({"full_stop": True}, "full_stop false, the settings say true"),
        ({"deep_tokens": 1}, "deep_tokens 2, the settings say 1"),
        ({"depth": 1}, "depth 2, the settings say 1"),
    ):
        changed = ANOMALY.model_copy(update=change)
        assert _refused(given(prompts), changed) == f"was trained with {rule}"
    free = ANOMALY.model_copy(update={"tau": 0.1, "blocks": (2,), "sigma_px": 0.0, "label": "other"})
    assert next(anomalyclip.score(given(prompts), free)).map.shape[1:] == (32, 32)

    other = encoder_settings(tmp_path / "other", seed=9)
    strange = make_source(tmp_path, "strange", other)
    for path, wanted in ((learned, APRIL), (prompts, ANOMALY)):
        assert "was trained with another encoder" in _refused(category_features(strange, other, path), wanted)

    _rewrite(learned, lambda w: w | {"block-1.bias": w["block-1.bias"][:5]})
    assert _refused(given(learned), APRIL) == "tensor block-1.bias has shape (5,), expected (24,)"
    _rewrite(prompts, lambda w: {name: value for name, value in w.items() if name != "deep"})
    assert _refused(given(prompts), ANOMALY) == "tensor deep has shape none, expected (1, 2, 16)"
    learned.write_bytes(whole)
    _rewrite(learned, lambda w: w | {"block-1.bias": w["block-1.bias"] * float("nan")})
    assert _refused(given(learned), APRIL) == "some of its weights are NaN or infinite"


def test_files_that_are_no_checkpoints_are_refused_in_one_line(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    assert _refused(given(path), APRIL) == "no such file or folder"
    path.write_bytes(b"not a checkpoint")
    assert _refused(given(path), APRIL) == "is not a safetensors file, or is cut short"
    save_file({"x": torch.zeros(1)}, path)
    assert "metadata name no system" in _refused(given(path), APRIL)
    save_file({"x": torch.zeros(1)}, path, metadata={"adflows": '{"schema": "adflows zsad learned 99"}'})
    assert "not a checkpoint that this version can read: schema" in _refused(given(path), APRIL)


def _official(**change: Any) -> dict[str, Any]:
    """Return the state of a prompt learner as the public code saves it: E 3, Q 2, M' 2, width 16."""
    generator = torch.Generator().manual_seed(7)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokenise = open_clip.SimpleTokenizer(context_length=77)
    state = {
        "ctx_pos": rand(1, 1, 3, 16),
        "ctx_neg": rand(1, 1, 3, 16),
        "token_prefix_pos": rand(1, 1, 1, 16),
        "token_suffix_pos": rand(1, 1, 73, 16),
        "token_prefix_neg": rand(1, 1, 1, 16),
        "token_suffix_neg": rand(1, 1, 73, 16),
        "tokenized_prompts_pos": tokenise(["X X X object."])[None],
        "tokenized_prompts_neg": tokenise(["X X X damaged object."])[None],
        "compound_prompts_text.0": rand(2, 16),
        "compound_prompt_projections.0.weight": rand(896, 16),
        "compound_prompt_projections.0.bias": rand(896),
    }
    merged = state | change
    return {name: value for name, value in merged.items() if value is not None}


@pytest.mark.parametrize("outer", [True, False])
def test_the_public_layout_is_imported(outer: bool, given: Given, tmp_path: Path) -> None:
    state, path = _official(), tmp_path / "epoch_15.pth"
    torch.save({"prompt_learner": state} if outer else state, path)
    found = import_official(path)
    assert torch.equal(found.weights["normal"], state["ctx_pos"][0, 0])
    assert torch.equal(found.weights["anomalous"], state["ctx_neg"][0, 0])
    assert torch.equal(found.weights["deep"], state["compound_prompts_text.0"][None])
    system = found.metadata.system
    assert isinstance(system, AnomalyClip)
    assert (system.context_tokens, system.deep_tokens, system.depth, system.full_stop) == (3, 2, 2, True)
    # it gives the same scores as it is, and after it is saved in our layout
    found.write(tmp_path / CHECKPOINT)
    maps = [[one.map for one in anomalyclip.score(given(file), system)] for file in (path, tmp_path / CHECKPOINT)]
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
    assert trained_weights(given(path), system, anomalyclip.shapes(system, 16)).keys() == {
        "normal",
        "anomalous",
        "deep",
    }


def test_sizes_that_the_configuration_leaves_out_are_the_checkpoints(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "epoch_15.pth"
    torch.save(_official(), path)
    stated = AnomalyClip(context_tokens=3, deep_tokens=2, depth=2, full_stop=True)
    maps = [[one.map for one in anomalyclip.score(given(path), system)] for system in (AnomalyClip(), stated)]
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
    with pytest.raises(InputError, match="was trained with full_stop true, the settings say false"):
        list(anomalyclip.score(given(path), AnomalyClip(full_stop=False)))
    assert with_trained_values(AnomalyClip(tau=0.5), None) == AnomalyClip(tau=0.5)


@pytest.mark.parametrize("outer", [True, False])
def test_april_gans_public_layout_is_imported(outer: bool, given: Given, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    dim = given(tmp_path).store.dim
    state = {}
    for number in range(2):
        state[f"fc.{number}.weight"] = torch.randn(dim, 32, generator=generator)
        state[f"fc.{number}.bias"] = torch.randn(dim, generator=generator)
    path = tmp_path / "visa_pretrained.pth"
    torch.save({"trainable_linearlayer": state} if outer else state, path)
    found = import_official(path, (1, 3))
    for number, block in enumerate((1, 3)):
        assert torch.equal(found.weights[f"block-{block}.weight"], state[f"fc.{number}.weight"])
        assert torch.equal(found.weights[f"block-{block}.bias"], state[f"fc.{number}.bias"])
    found.write(tmp_path / CHECKPOINT)
    maps = [[one.map for one in april_gan.score(given(file), APRIL)] for file in (path, tmp_path / CHECKPOINT)]
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
    with pytest.raises(InputError, match="has linear layers for 2 blocks, the settings name 4"):
        import_official(path)
    torch.save(state | {"fc.1.bias": torch.zeros(5)}, path)
    with pytest.raises(InputError, match=r"fc\.1 has a weight or bias of another shape than fc\.0"):
        import_official(path, (1, 3))
    torch.save({name: value for name, value in state.items() if name != "fc.1.bias"}, path)
    with pytest.raises(InputError, match=r"fc\.1 has no weight of shape \[dimension width\] with a bias"):
        import_official(path, (1, 3))


def test_imported_prompts_without_deep_tokens_or_full_stop(tmp_path: Path) -> None:
    path = tmp_path / "epoch_15.pth"
    tokens = open_clip.SimpleTokenizer(context_length=77)(["X X X object"])[None]
    torch.save(_official(**{"compound_prompts_text.0": None, "tokenized_prompts_pos": tokens}), path)
    found = import_official(path)
    system = found.metadata.system
    assert isinstance(system, AnomalyClip)
    assert (system.deep_tokens, system.full_stop) == (0, False)
    assert found.weights.keys() == {"normal", "anomalous"}


BAD_OFFICIAL: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "ctx_pos and ctx_neg are missing"),
    "another model": ({"weight": torch.zeros(2)}, "ctx_pos and ctx_neg are missing"),
    "no tensor": (_official(ctx_pos=3), "ctx_pos is not of shape"),
    "two classes": (_official(ctx_pos=torch.zeros(2, 1, 3, 16)), "ctx_pos is not of shape"),
    "unlike sides": (_official(ctx_neg=torch.zeros(1, 1, 4, 16)), "have different lengths or widths"),
    "unlike widths": (_official(**{"compound_prompts_text.0": torch.zeros(2, 8)}), "have different lengths or widths"),
    "unlike layers": (_official(**{"compound_prompts_text.1": torch.zeros(1, 16)}), "compound_prompts_text.1"),
    "too many deep tokens": (_official(**{"compound_prompts_text.0": torch.zeros(4, 16)}), "match no valid settings"),
}


@pytest.mark.parametrize(("state", "rule"), BAD_OFFICIAL.values(), ids=BAD_OFFICIAL.keys())
def test_other_torch_files_are_refused_in_one_line(state: Any, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save(state, path)
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("evil"),)  # type: ignore[return-value]


def test_a_torch_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"prompt_learner": _Evil()}, path)
    with pytest.raises(InputError, match="not a torch file of plain tensors"):
        read_checkpoint(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a torch file of plain tensors"):
        read_checkpoint(path)


def test_data_of_no_source_has_no_crops() -> None:
    with pytest.raises(InputError, match="contains no anomalous image"):
        gather_crops([])
    assert not TrainingData().crops


class _Recorder:
    """A learner that learns nothing and records the crops of its batches."""

    reads: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.shown: list[list[bytes]] = []

    def initial(self, generator: torch.Generator) -> Weights:
        return {"x": torch.zeros(1)}

    def loss(self, weights: Weights, batch: Batch) -> torch.Tensor:
        self.shown.append([token.numpy().tobytes() for token in batch.class_tokens])
        return 0 * weights["x"].sum()


def test_each_epoch_shows_every_crop_once_in_an_order_of_its_own(sources: tuple[Source[Path], ...]) -> None:
    data, recorder = gather_crops(sources), _Recorder()
    assert fit(recorder, data, SHORT, CPU).losses == [0.0] * 12
    assert [len(batch) for batch in recorder.shown] == [5, 5, 5, 1] * 3
    epochs = [[token for batch in recorder.shown[at : at + 4] for token in batch] for at in (0, 4, 8)]
    every = data.batch(range(16), (), CPU).class_tokens
    assert all(sorted(epoch) == sorted(token.numpy().tobytes() for token in every) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
