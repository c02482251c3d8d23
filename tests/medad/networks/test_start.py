"""Trainings that start from another network, and trainings with a number of steps instead of epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medad.base.errors import ConfigError
from medad.config.liver import LiverSettings
from medad.config.training import PhaseSettings
from medad.networks import nets
from medad.networks.batches import load_slices
from medad.networks.job import Job, fingerprint
from medad.networks.schedule import learning_rate, steps_per_epoch, total_epochs, total_steps
from medad.networks.train import train_restoration, train_segmentation
from tests.killed import TrainingKilled, kill_at
from tests.medad.prepared import TINY, tiny_settings, write_prepared

Weights = dict[str, torch.Tensor]


def settings(steps: int, rate: float = 1e-3, **changes: Any) -> LiverSettings:
    phase = {"epochs": 7, "steps": steps, "batch_size": 4, "learning_rate": rate, "rate": "one_cycle"}
    train = {"restoration": phase, "segmentation": phase, "checkpoint_minutes": 1e-6}
    return tiny_settings(train=train, **changes)


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def weights(folder: Path) -> Weights:
    found: Weights = load_file(folder / nets.MODEL)
    return found


def largest_difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [write_prepared(tmp_path_factory.mktemp("prepared") / "case", slices=10)]


@pytest.fixture(scope="module")
def base(prepared: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two networks, restoration/ and segmentation/, trained with seed 3."""
    root = tmp_path_factory.mktemp("base")
    one, two = new_folder(root / "restoration"), new_folder(root / "segmentation")
    train_restoration(prepared, settings(4, seed=3), one)
    train_segmentation(prepared, one, settings(4, seed=3), two)
    return root


@pytest.mark.parametrize(("slices", "steps", "epochs"), [(10, 5, 2), (10, 6, 2), (10, 7, 3), (100, 5, 1), (3, 5, 5)])
def test_steps_decide_the_number_of_epochs(slices: int, steps: int, epochs: int) -> None:
    phase = PhaseSettings(epochs=99, steps=steps, batch_size=4)
    assert (total_steps(phase, slices), total_epochs(phase, slices)) == (steps, epochs)
    by_epochs = PhaseSettings(epochs=epochs, batch_size=4)
    assert total_epochs(by_epochs, slices) == epochs
    assert total_steps(by_epochs, slices) == epochs * steps_per_epoch(by_epochs, slices)


def test_exactly_these_steps_are_run(prepared: list[Path], tmp_path: Path) -> None:
    seen = []
    train_restoration(
        prepared, settings(5), tmp_path, on_progress=lambda progress: seen.append((progress.steps, progress.epochs))
    )
    curve = json.loads((tmp_path / "curve.json").read_text(encoding="utf-8"))
    assert (curve["epochs"], curve["steps_per_epoch"], curve["steps"]) == (2, 3, [1, 2, 3, 4, 5])
    assert seen[-1] == (5, 2)


def test_the_rate_follows_the_steps(prepared: list[Path], tmp_path: Path) -> None:
    """Six steps are two epochs of three batches, so both ways to say it give equal weights."""
    phase = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "rate": "one_cycle"}
    by_epochs = tiny_settings(train={"restoration": phase, "segmentation": phase})
    one, other, shorter = (new_folder(tmp_path / name) for name in ("one", "other", "shorter"))
    train_restoration(prepared, by_epochs, one)
    train_restoration(prepared, settings(6), other)
    train_restoration(prepared, settings(5), shorter)
    assert largest_difference(weights(one), weights(other)) == 0
    assert largest_difference(weights(one), weights(shorter)) > 0
    peak = PhaseSettings(epochs=1, learning_rate=1e-3, rate="one_cycle")
    assert learning_rate(peak, 5, 6) < learning_rate(peak, 4, 6)


@pytest.mark.parametrize("role", nets.PHASES)
def test_one_tiny_step_leaves_the_weights_of_the_base(
    prepared: list[Path], base: Path, tmp_path: Path, role: nets.Role
) -> None:
    def train(out: Path, initial: Path | None) -> None:
        if role == "restoration":
            train_restoration(prepared, settings(1, 1e-9), out, initial=initial)
        else:
            train_segmentation(prepared, base / "restoration", settings(1, 1e-9), out, initial=initial)

    started, random = new_folder(tmp_path / "started"), new_folder(tmp_path / "random")
    train(started, base / role)
    train(random, None)
    assert largest_difference(weights(started), weights(base / role)) < 1e-6
    assert largest_difference(weights(random), weights(base / role)) > 1e-2


def test_a_base_in_half_precision_is_trained_in_single_precision(
    prepared: list[Path], base: Path, tmp_path: Path
) -> None:
    half, out = new_folder(tmp_path / "half"), new_folder(tmp_path / "out")
    net, shape = nets.load(base / "restoration" / nets.MODEL, "restoration")
    nets.save(half / nets.MODEL, net, "restoration", shape, dtype=torch.float16)
    assert {value.dtype for value in weights(half).values()} == {torch.float16}
    train_restoration(prepared, settings(1, 1e-9), out, initial=half)
    assert {value.dtype for value in weights(out).values()} == {torch.float32}
    whole = weights(base / "restoration")
    for name, value in weights(out).items():
        torch.testing.assert_close(value, whole[name], rtol=2**-11, atol=1e-6)


def test_a_base_of_another_shape_is_refused(prepared: list[Path], base: Path, tmp_path: Path) -> None:
    wider = settings(1, restoration=TINY | {"widths": (8, 16, 16)})
    with pytest.raises(ConfigError, match="restoration: its settings differ"):
        train_restoration(prepared, wider, tmp_path, initial=base / "restoration")


@pytest.mark.parametrize("same", [True, False])
def test_a_checkpoint_of_another_base_is_not_continued(
    prepared: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    monkeypatch.setattr("medad.networks.train.PROGRESS_SECONDS", 0.0)
    file, out = tmp_path / "state.pt", new_folder(tmp_path / "out")
    with pytest.raises(TrainingKilled):
        train_restoration(
            prepared, settings(6), out, checkpoint=file, on_progress=kill_at(4), initial=base / "restoration"
        )
    assert file.is_file()
    train_restoration(prepared, settings(6), out, checkpoint=file, initial=base / "restoration" if same else None)
    resumed = json.loads((out / "curve.json").read_text(encoding="utf-8"))["resumed_at_step"]
    assert (resumed > 0) == same


def test_a_checkpoint_knows_the_copies(prepared: list[Path], tmp_path: Path) -> None:
    data, plain = load_slices(prepared, torch.device("cpu")), settings(1)
    digests = set()
    for content in (None, b"one", b"other"):
        copies = [] if content is None else [new_folder(tmp_path / content.decode())]
        for folder in copies:
            (folder / "copies.safetensors").write_bytes(content or b"")
            (folder / "artifact.json").write_text(str(folder), encoding="utf-8")
        job = Job(
            "x", {"restoration": plain.restoration}, plain.train.restoration, lambda *_: data.pixel_mm, copies=copies
        )
        digests.add(fingerprint(job, plain, data, None))
    assert len(digests) == 3
