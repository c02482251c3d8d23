"""Joint training against a plain loop, and snapshots against shorter trainings, also after kills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from medad.anomalies.synthesis import synthesise
from medad.config.liver import LiverSettings
from medad.networks import nets
from medad.networks.batches import BATCH, INITIAL, ORDER, generator_for
from medad.networks.infer import load_networks, predict
from medad.networks.train import train_joint, train_restoration, train_segmentation
from tests.killed import TrainingKilled, kill_at
from tests.medad.prepared import DISC, SIDE, save_slices, tiny_settings

SLICES, BATCH_SIZE, RATE = 6, 4, 1e-3
CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(100, 140, (SLICES, SIDE, SIDE)).astype(np.uint8)
ORGAN = np.broadcast_to(DISC, PIXELS.shape).copy()


def _settings(**changes: Any) -> LiverSettings:
    phase = {"epochs": 3, "batch_size": BATCH_SIZE, "learning_rate": RATE}
    train = {"restoration": phase, "segmentation": phase, "checkpoint_minutes": 1e-6} | changes.pop("train", {})
    return tiny_settings(train=train, **changes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_slices(tmp_path_factory.mktemp("case"), PIXELS * ORGAN, ORGAN)]


@pytest.fixture(scope="module")
def one(prepared: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of phase one."""
    out = tmp_path_factory.mktemp("one")
    train_restoration(prepared, _settings(), out, device="cpu")
    return out


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _networks(folder: Path) -> dict[str, bytes]:
    """Return the files of all networks. Equal bytes mean equal settings and equal weights."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("loss", ["l1", "l2_ssim"])
@pytest.mark.parametrize("architecture", ["unet", "autoencoder"])
def test_joint_training_is_the_plain_loop(prepared: list[Path], tmp_path: Path, loss: str, architecture: str) -> None:
    """Compare with one Adam over both networks, the sum of both losses, and gradients through the restoration."""
    from medad.networks.losses import focal_loss, l2_ssim_loss

    settings = _settings(
        restoration={"widths": (8, 8, 8), "groups": 4, "architecture": architecture},
        train={"schedule": "joint", "restoration_loss": loss},
    )
    out = _folder(tmp_path / "out")
    train_joint(prepared, settings, out, device="cpu")

    def start(role: nets.Role) -> torch.nn.Module:
        return nets.build(role, getattr(settings, role), generator_for(0, role, INITIAL, 0, CPU)).train()

    restorer, segmenter = start("restoration"), start("segmentation")
    optimiser = torch.optim.Adam([*restorer.parameters(), *segmenter.parameters()], lr=RATE)
    organ, pixels = torch.from_numpy(ORGAN)[:, None], torch.from_numpy(PIXELS * ORGAN)[:, None].float()
    losses = []
    for epoch in range(3):
        order = torch.randperm(SLICES, generator=generator_for(0, "restoration", ORDER, epoch, CPU))
        for place, chosen in enumerate(torch.split(order, BATCH_SIZE)):
            generator = generator_for(0, "restoration", BATCH, 2 * epoch + place, CPU)
            made = synthesise(pixels[chosen], organ[chosen], settings.synthesis, generator)
            query, clean = made.image / 255, pixels[chosen] / 255
            restored = restorer(query)
            found = focal_loss(segmenter(torch.cat((restored, query), 1)), made.mask, settings.train.focal)
            restoring = functional.l1_loss(restored, clean) if loss == "l1" else l2_ssim_loss(restored, clean)
            optimiser.zero_grad()
            total = restoring + found
            total.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(float(total.detach()))
    for role, net in (("restoration", restorer), ("segmentation", segmenter)):
        trained = dict(nets.load(out / role / nets.MODEL, role)[0].named_parameters())  # type: ignore[arg-type]
        for name, value in net.named_parameters():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)
        curve = json.loads((out / role / "curve.json").read_text(encoding="utf-8"))
        assert curve["phase"] == "joint"
        assert curve["loss"] == pytest.approx(losses, rel=1e-5)


def test_joint_training_starts_where_phase_one_does_and_goes_another_way(
    prepared: list[Path], one: Path, tmp_path: Path
) -> None:
    train_joint(prepared, _settings(train={"schedule": "joint"}), tmp_path, device="cpu")
    assert _networks(one)[nets.MODEL] != _networks(tmp_path)[f"restoration/{nets.MODEL}"]


def _cut(train: Callable[..., None], out: Path, checkpoint: Path, at_step: int, *arguments: Any) -> None:
    """Train until the checkpoint of step `at_step` is on disk, then stop."""
    with pytest.raises(TrainingKilled):
        train(*arguments, out, device="cpu", checkpoint=checkpoint, on_progress=kill_at(at_step + 1))
    assert checkpoint.is_file()


@pytest.mark.parametrize("at_step", [1, 4])
@pytest.mark.parametrize("kind", ["blobs", "perlin_texture"])
def test_joint_training_resumes_to_the_same_networks(
    prepared: list[Path], tmp_path: Path, at_step: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medad.networks.train.PROGRESS_SECONDS", 0.0)
    settings = _settings(synthesis={"kind": kind, "blur_sigma_px": 4.0}, train={"schedule": "joint"})
    whole, cut, resumed = (_folder(tmp_path / name) for name in ("whole", "cut", "resumed"))
    checkpoint = tmp_path / "fit.pt"
    train_joint(prepared, settings, whole, device="cpu")
    _cut(train_joint, cut, checkpoint, at_step, prepared, settings)
    train_joint(prepared, settings, resumed, device="cpu", checkpoint=checkpoint)
    assert _networks(resumed) == _networks(whole)
    curve = json.loads((resumed / "restoration" / "curve.json").read_text(encoding="utf-8"))
    assert curve["resumed_at_step"] == at_step
    assert not checkpoint.exists()


def test_parts_of_a_batch_give_the_same_joint_networks(prepared: list[Path], tmp_path: Path) -> None:
    settings = _settings(train={"schedule": "joint", "restoration_loss": "l2_ssim"})
    whole, parts = _folder(tmp_path / "whole"), _folder(tmp_path / "parts")
    train_joint(prepared, settings, whole, device="cpu")
    train_joint(prepared, settings, parts, device="cpu", largest_batch=1)
    a, b = (json.loads((f / "restoration" / "curve.json").read_text(encoding="utf-8"))["loss"] for f in (whole, parts))
    assert a == pytest.approx(b, rel=1e-3)


def _segmentation(prepared: list[Path], one: Path, out: Path, **train: Any) -> dict[str, bytes]:
    phase = {"epochs": 5, "batch_size": BATCH_SIZE, "learning_rate": RATE} | train.pop("segmentation", {})
    train_segmentation(prepared, one, _settings(train=train | {"segmentation": phase}), _folder(out), device="cpu")
    return _networks(out)


def test_a_snapshot_is_the_network_of_a_training_of_so_many_epochs(
    prepared: list[Path], one: Path, tmp_path: Path
) -> None:
    taken = _segmentation(prepared, one, tmp_path / "taken", snapshot_epochs=2)
    assert set(taken) == {nets.MODEL, *(f"snapshot-000{epoch}.safetensors" for epoch in (2, 4, 5))}
    for epochs in (2, 4, 5):
        alone = _segmentation(prepared, one, tmp_path / f"alone{epochs}", segmentation={"epochs": epochs})
        assert set(alone) == {nets.MODEL}
        assert taken[f"snapshot-000{epochs}.safetensors"] == alone[nets.MODEL]
    assert taken[nets.MODEL] == taken["snapshot-0005.safetensors"]

    # the file of a snapshot can be used for segmentation
    by_file = load_networks(one, tmp_path / "taken" / "snapshot-0002.safetensors", "cpu")
    by_folder = load_networks(one, tmp_path / "alone2", "cpu")
    first, second = (predict(PIXELS, networks, 4).probability for networks in (by_file, by_folder))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("lost", [False, True])
def test_snapshots_survive_a_kill(
    prepared: list[Path], one: Path, tmp_path: Path, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medad.networks.train.PROGRESS_SECONDS", 0.0)
    cut, resumed = _folder(tmp_path / "cut"), _folder(tmp_path / "resumed")
    whole = _segmentation(prepared, one, tmp_path / "whole", snapshot_epochs=1)
    phase = {"epochs": 5, "batch_size": BATCH_SIZE, "learning_rate": RATE}
    settings = _settings(train={"snapshot_epochs": 1, "segmentation": phase})
    kept = tmp_path / "kept"
    _cut(
        train_segmentation, cut, kept / "fit.pt", 7, prepared, one, settings
    )  # 2 steps per epoch: within the fourth epoch
    assert not list(cut.iterdir())
    if lost:
        next(kept.glob("*0002*")).unlink()
    train_segmentation(prepared, one, settings, resumed, device="cpu", checkpoint=kept / "fit.pt")
    assert _networks(resumed) == whole
    curve = json.loads((resumed / "curve.json").read_text(encoding="utf-8"))
    assert curve["resumed_at_step"] == (0 if lost else 7)
    assert not list(kept.iterdir())
