"""Both phases on small slices: the loss falls, phase one stays frozen, a resumed run gives the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medad.base.errors import ConfigError, InputError
from medad.base.progress import Progress
from medad.config.liver import LiverSettings
from medad.config.training import FocalSettings
from medad.networks.batches import generator_for
from medad.networks.infer import load_networks, predict
from medad.networks.losses import focal_loss, l1_loss
from medad.networks.train import train_restoration, train_segmentation
from tests.killed import TrainingKilled, kill_at
from tests.medad.prepared import DISC, SIDE, save_slices, tiny_settings

EPOCHS = 4


def _settings(epochs: int = EPOCHS, rate: float = 1e-3, **changes: Any) -> LiverSettings:
    phase = {"epochs": epochs, "batch_size": 4, "learning_rate": rate}
    train = {"restoration": phase, "segmentation": phase, "checkpoint_minutes": 1e-6}
    return tiny_settings(**{"train": train, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two cases with 6 and 4 slices: a disc of equalised noise."""
    root, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    folders = []
    for number, count in enumerate((6, 4)):
        organ = np.broadcast_to(DISC, (count, SIDE, SIDE)).copy()
        pixels = (rng.integers(100, 140, organ.shape) * organ).astype(np.uint8)
        folders.append(save_slices(root / f"case{number}", pixels, organ))
    return folders


@pytest.fixture(scope="module")
def whole(prepared: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of phase one of an uninterrupted training."""
    out = tmp_path_factory.mktemp("whole")
    train_restoration(prepared, _settings(), out)
    return out


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return weights


def _same(folder: Path, other: Path) -> bool:
    expected = _weights(other)
    return all(torch.equal(value, expected[name]) for name, value in _weights(folder).items())


def _curve(folder: Path) -> dict[str, Any]:
    curve: dict[str, Any] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    return curve


def test_losses_by_hand() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 0] = torch.tensor(3.0).log()  # probability of class 1: 3/4 there, 1/2 elsewhere
    mask = torch.tensor([[[[True, True], [False, False]]]])
    expected = -(0.25**2 * np.log(0.75) + 3 * 0.5**2 * np.log(0.5)) / 4
    assert float(focal_loss(logits, mask, FocalSettings())) == pytest.approx(expected, rel=1e-6)
    entropy = -(np.log(0.75) + 3 * np.log(0.5)) / 4
    assert float(focal_loss(logits, mask, FocalSettings(gamma=0.0, alpha=2.0))) == pytest.approx(2 * entropy, rel=1e-6)
    half = torch.full((1, 1, 2, 2), 0.5)
    assert float(l1_loss(half, torch.tensor([[[[0.5, 1.0], [0.0, 0.5]]]]))) == pytest.approx(0.25)


def test_generators_depend_on_every_argument() -> None:
    cpu = torch.device("cpu")
    arguments = [(0, "restoration", 0, 0), (1, "restoration", 0, 0), (0, "segmentation", 0, 0),
                 (0, "restoration", 1, 0), (0, "restoration", 0, 1)]  # fmt: skip
    draws = {float(torch.rand(1, generator=generator_for(*a, cpu), dtype=torch.float64)) for a in arguments}  # type: ignore[arg-type]
    assert len(draws) == len(arguments)
    again = torch.rand(1, generator=generator_for(0, "restoration", 0, 0, cpu), dtype=torch.float64)
    assert float(again) in draws


@pytest.mark.parametrize("largest", [1, 3])
def test_smaller_parts_of_a_batch_give_the_same_weights(prepared: list[Path], tmp_path: Path, largest: int) -> None:
    """The gradient of a mean is the mean of the parts' gradients, so results differ by rounding only."""
    settings = _settings(train={name: {"epochs": 1, "batch_size": 4} for name in ("restoration", "segmentation")})
    trained = []
    for name, parts in (("whole", None), ("parts", largest)):
        one, two = _folder(tmp_path / f"{name}-one"), _folder(tmp_path / f"{name}-two")
        train_restoration(prepared, settings, one, largest_batch=parts)
        train_segmentation(prepared, one, settings, two, largest_batch=parts)
        trained.append({**_weights(one), **{f"two.{key}": value for key, value in _weights(two).items()}})
    whole, parted = trained
    # Adam divides by the size of the gradient, so rounding near zero can change a weight by part of the step of 1e-4
    for key, value in whole.items():
        torch.testing.assert_close(value, parted[key], rtol=0, atol=1e-4)
        assert float((value - parted[key]).abs().mean()) < 1e-6


def test_both_phases_learn(prepared: list[Path], tmp_path: Path) -> None:
    settings = _settings(epochs=32, rate=3e-3)
    one, two = _folder(tmp_path / "one"), _folder(tmp_path / "two")
    seen: list[Progress] = []
    train_restoration(prepared, settings, one, on_progress=seen.append)
    before = _weights(one)
    train_segmentation(prepared, one, settings, two)
    assert all(torch.equal(value, before[name]) for name, value in _weights(one).items())
    for folder in (one, two):
        curve = _curve(folder)
        assert len(curve["loss"]) == 32 * 3
        assert curve["slices"] == 10
        assert np.mean(curve["loss"][-20:]) < 0.5 * np.mean(curve["loss"][:20])
    assert (seen[-1].step, seen[-1].epoch, seen[-1].seconds_left) == (96, 32, 0.0)

    # a bright square in healthy noise must be more anomalous than the rest
    rng = np.random.default_rng(5)
    pixels = (rng.integers(100, 140, (1, SIDE, SIDE)) * DISC).astype(np.uint8)
    pixels[0, 12:19, 12:19] += 80
    result = predict(pixels, load_networks(one, two, "cpu"), 8)
    square = np.zeros((1, SIDE, SIDE), bool)
    square[0, 12:19, 12:19] = True
    inside, outside = result.probability[square].mean(), result.probability[~square & DISC[None]].mean()
    assert inside > outside + 0.2


def test_equal_seeds_equal_weights_and_other_seeds_do_not(prepared: list[Path], whole: Path, tmp_path: Path) -> None:
    again, other = _folder(tmp_path / "again"), _folder(tmp_path / "other")
    train_restoration(prepared, _settings(), again)
    train_restoration(prepared, _settings(seed=1), other)
    assert _same(again, whole)
    assert not _same(other, whole)


@pytest.mark.parametrize("at_step", [1, 5, 11])
def test_resume_equals_the_uninterrupted_run(
    prepared: list[Path], whole: Path, tmp_path: Path, at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medad.networks.train.PROGRESS_SECONDS", 0.0)
    cut, checkpoint = _folder(tmp_path / "cut"), tmp_path / "fit.ckpt"
    with pytest.raises(TrainingKilled):
        train_restoration(prepared, _settings(), cut, checkpoint=checkpoint, on_progress=kill_at(at_step + 1))
    assert checkpoint.is_file()
    train_restoration(prepared, _settings(), cut, checkpoint=checkpoint)
    assert _same(cut, whole)
    assert _curve(cut)["resumed_at_step"] == at_step
    assert _curve(cut)["loss"] == _curve(whole)["loss"]
    assert not checkpoint.exists()


@pytest.mark.slow
def test_kill_9_then_resume(prepared: list[Path], tmp_path: Path) -> None:
    """Resume a training that got SIGKILL at some point."""
    settings = _settings(epochs=20)
    out, whole, checkpoint = _folder(tmp_path / "out"), _folder(tmp_path / "whole"), tmp_path / "fit.ckpt"
    script = (
        "import sys; from pathlib import Path; from medad.config.liver import LiverSettings\n"
        "from medad.networks.train import train_restoration\n"
        "settings = LiverSettings.model_validate_json(sys.argv[1])\n"
        "out, checkpoint, *prepared = map(Path, sys.argv[2:])\n"
        "train_restoration(prepared, settings, out, checkpoint=checkpoint)\n"
    )
    command = [sys.executable, "-c", script, settings.model_dump_json(), str(out), str(checkpoint), *map(str, prepared)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model.safetensors").exists()
    train_restoration(prepared, settings, out, checkpoint=checkpoint)
    train_restoration(prepared, settings, whole)
    assert _curve(out)["resumed_at_step"] > 0
    assert _same(out, whole)


@pytest.mark.parametrize("damage", ["truncated", "other settings"])
def test_unfit_checkpoint_is_not_resumed(
    prepared: list[Path], whole: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medad.networks.train.PROGRESS_SECONDS", 0.0)
    out, checkpoint = _folder(tmp_path / "out"), tmp_path / "fit.ckpt"
    earlier = _settings(seed=3) if damage == "other settings" else _settings()
    with pytest.raises(TrainingKilled):
        train_restoration(prepared, earlier, _folder(tmp_path / "cut"), checkpoint=checkpoint, on_progress=kill_at(6))
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    train_restoration(prepared, _settings(), out, checkpoint=checkpoint)
    assert _curve(out)["resumed_at_step"] == 0
    assert _same(out, whole)


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no slice with liver"):
        train_restoration([], _settings(), tmp_path)


def test_prediction_does_not_depend_on_the_batch(prepared: list[Path], whole: Path, tmp_path: Path) -> None:
    train_segmentation(prepared, whole, _settings(), tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (7, SIDE, SIDE)).astype(np.uint8)
    networks = load_networks(whole, tmp_path, "cpu")
    results = [predict(pixels, networks, batch) for batch in (1, 3, 8)]
    for other in results[1:]:
        np.testing.assert_allclose(other.probability, results[0].probability, atol=1e-5)
        assert np.abs(other.restored.astype(int) - results[0].restored).max() <= 1
    assert predict(pixels[:0], networks, 4).probability.shape == (0, SIDE, SIDE)


def test_a_diverged_training_says_so_and_keeps_no_checkpoint(
    prepared: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return (restored - clean).abs().mean() * float("nan")

    monkeypatch.setattr("medad.networks.train.l1_loss", diverged)
    out, checkpoint = _folder(tmp_path / "out"), tmp_path / "fit.ckpt"
    with pytest.raises(ConfigError, match=r"train\.restoration: the loss became NaN or infinite at step 1; lower"):
        train_restoration(prepared, _settings(), out, checkpoint=checkpoint)
    assert not checkpoint.exists()
    assert not list(out.iterdir())
