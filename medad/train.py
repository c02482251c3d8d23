"""Two-phase training: the restoration network first, then, frozen, the segmentation network on top (000, 3.3.2).

One loop serves both phases. Batch t of a phase is a pure function of (seed, phase, t): which slices, which noise,
which contrast. So a run killed at any step and resumed from its checkpoint is, on a CPU, the run that was never killed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from medad import nets
from medad.config import FocalSettings, LiverSettings, NetSettings, PhaseSettings
from medad.devices import keep_freed_memory, pick_device
from medad.errors import ConfigError, InputError
from medad.io import atomic_path
from medad.preprocess import load_prepared
from medad.progress import OnProgress, Progress
from medad.synthesis import Synthesised, synthesise

PROGRESS_SECONDS = 0.5
PHASE_CODE: dict[nets.Role, int] = {"restoration": 1, "segmentation": 2}
INITIAL, ORDER, BATCH = 0, 1, 2  # what a generator is for


@dataclass(frozen=True)
class HealthySlices:
    """All training slices, on the device.

    Attributes
    ----------
    pixels
        Grey values 0..255.
    organ
        Liver.
    """

    pixels: UInt8[Tensor, "N 1 S S"]
    organ: Bool[Tensor, "N 1 S S"]


def load_slices(prepared: Sequence[Path], device: torch.device) -> HealthySlices:
    """Gather the slices of prepared folders. Raises InputError when there is none at all or the sizes differ."""
    cases = [load_prepared(folder / "prepared.safetensors").slices for folder in prepared]
    cases = [case for case in cases if len(case.z)]
    if not cases:
        raise InputError("training data", "no slice with liver to train on")
    sides = {case.grid.size_px for case in cases}
    if len(sides) > 1:
        raise InputError("training data", f"cases were prepared at different slice sizes: {sorted(sides)} px")
    pixels = torch.from_numpy(np.concatenate([case.pixels for case in cases]))[:, None]
    organ = torch.from_numpy(np.concatenate([case.organ for case in cases]))[:, None]
    return HealthySlices(pixels.to(device), organ.to(device))


def generator_for(seed: int, phase: nets.Role, purpose: int, index: int, device: torch.device) -> torch.Generator:
    """A generator that depends on nothing but its arguments."""
    state = np.random.SeedSequence((seed, PHASE_CODE[phase], purpose, index)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))


def l1_loss(restored: Float[Tensor, "B 1 S S"], clean: Float[Tensor, "B 1 S S"]) -> Float[Tensor, ""]:
    """Mean absolute difference to the clean slice.

    Eq. 3.2 writes |I_s - I~_s|, the corrupted slice as target, which would teach the identity; the text asks "to
    restore the anomalous region", so the target is I.
    """
    return functional.l1_loss(restored, clean)


def focal_loss(
    logits: Float[Tensor, "B 2 S S"], mask: Bool[Tensor, "B 1 S S"], settings: FocalSettings
) -> Float[Tensor, ""]:
    """Eq. 3.3: -alpha (1 - m)^gamma log m, m the probability of the true class, alpha alike for both classes; the mean.

    MONAI's FocalLoss weighs the classes alpha and 1 - alpha, so the thesis's alpha = 1 would drop the background there.
    """
    log_probability = functional.log_softmax(logits.float(), 1).gather(1, mask.long())
    return (-settings.alpha * (1 - log_probability.exp()) ** settings.gamma * log_probability).mean()


def train_restoration(
    prepared: Sequence[Path],
    settings: LiverSettings,
    out: Path,
    *,
    device: str = "auto",
    largest_batch: int | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Phase one: restore healthy liver where a pseudo anomaly was painted.

    Parameters
    ----------
    prepared
        Folders with prepared.safetensors of healthy cases.
    settings
        `restoration`, `synthesis`, `train` and `seed` are used.
    out
        Existing folder; gets model.safetensors and curve.json.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    largest_batch
        Slices that go through the network at a time. Fewer than the batch has: its gradient is the sum over the parts,
        the same to rounding, in less memory.
    checkpoint
        File that survives a kill: written every `checkpoint_minutes`, resumed from if there, removed at the end.
    on_progress
        Called at most twice a second, and after the last step.
    """
    place = pick_device(device)

    def loss(net: nn.Module, batch: Synthesised, clean: Tensor) -> Tensor:
        return l1_loss(nets.restore(net, batch.image / 255).float(), clean / 255)

    job = _Job("restoration", settings.restoration, settings.train.restoration, loss, frozen="")
    _run(job, prepared, settings, place, largest_batch, out, checkpoint, on_progress)


def train_segmentation(
    prepared: Sequence[Path],
    restoration: Path,
    settings: LiverSettings,
    out: Path,
    *,
    device: str = "auto",
    largest_batch: int | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Phase two: find the pseudo anomaly from query and restoration; the restoration network is frozen.

    `restoration` is the folder phase one wrote; the rest as in `train_restoration`, with `segmentation` settings.
    """
    place = pick_device(device)
    frozen_file = restoration / "model.safetensors"
    restorer = nets.bake(nets.load(frozen_file, "restoration")[0]).to(place).eval().requires_grad_(False)

    def loss(net: nn.Module, batch: Synthesised, clean: Tensor) -> Tensor:
        query = batch.image / 255
        with torch.no_grad():
            restored = nets.restore(restorer, query).to(query.dtype)
        return focal_loss(nets.segment_logits(net, restored, query), batch.mask, settings.train.focal)

    frozen = hashlib.sha256(frozen_file.read_bytes()).hexdigest()
    job = _Job("segmentation", settings.segmentation, settings.train.segmentation, loss, frozen)
    _run(job, prepared, settings, place, largest_batch, out, checkpoint, on_progress)


@dataclass(frozen=True)
class _Job:
    """What differs between the phases. `frozen` names the weights that the loss holds fixed."""

    role: nets.Role
    net: NetSettings
    phase: PhaseSettings
    loss: Callable[[nn.Module, Synthesised, Tensor], Tensor]
    frozen: str


def _run(
    job: _Job,
    prepared: Sequence[Path],
    settings: LiverSettings,
    device: torch.device,
    largest_batch: int | None,
    out: Path,
    checkpoint: Path | None,
    on_progress: OnProgress | None,
) -> None:
    """Fit one network from its start or its checkpoint, and write it."""
    keep_freed_memory()
    started = time.monotonic()
    data = load_slices(prepared, device)
    initial = generator_for(settings.seed, job.role, INITIAL, 0, torch.device("cpu"))
    net = nets.build(job.role, job.net, initial).to(device)
    if device.type == "cuda":
        net = net.to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(net.parameters(), lr=job.phase.learning_rate)
    fingerprint = _fingerprint(job, settings, data)
    state = _load_checkpoint(checkpoint, fingerprint, device)
    done: list[float] = []
    if state is not None:
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["losses"]

    def save(losses: list[float]) -> None:
        assert checkpoint is not None
        _save_checkpoint(checkpoint, fingerprint, net, optimiser, losses)

    keep = save if checkpoint is not None else None
    part = min(largest_batch or job.phase.batch_size, job.phase.batch_size)
    losses = _fit(job, net, optimiser, data, settings, part, done, on_progress, keep)
    nets.save(out / "model.safetensors", net, job.role, job.net)
    curve = {
        "phase": job.role,
        "epochs": job.phase.epochs,
        "steps_per_epoch": ceil(len(data.pixels) / job.phase.batch_size),
        "slices": len(data.pixels),
        "steps": list(range(1, len(losses) + 1)),
        "loss": losses,
        "seconds": round(time.monotonic() - started, 3),
        "resumed_at_step": len(done),
        "device": str(device),
    }
    (out / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def _fit(
    job: _Job,
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    data: HealthySlices,
    settings: LiverSettings,
    part: int,
    done: list[float],
    on_progress: OnProgress | None,
    save: Callable[[list[float]], None] | None,
) -> list[float]:
    """The loop of both phases, from step len(done) on, `part` slices at a time; returns every step's loss."""
    device = data.pixels.device
    per_epoch = ceil(len(data.pixels) / job.phase.batch_size)
    steps = per_epoch * job.phase.epochs
    losses, pending = list(done), list[Tensor]()  # losses stay on the device until someone looks
    begun = reported = saved = time.monotonic()
    autocast = settings.train.mixed_precision and device.type == "cuda"
    net.train()
    for step in range(len(done), steps):
        chosen = _batch_indices(job, settings.seed, len(data.pixels), step).to(device)
        clean = data.pixels[chosen].float()
        generator = generator_for(settings.seed, job.role, BATCH, step, device)
        batch = synthesise(clean, data.organ[chosen], settings.synthesis, generator)
        optimiser.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for some in torch.split(torch.arange(len(clean), device=device), part):
            with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
                # both losses are means over pixels, of which each slice has as many
                share = job.loss(net, batch.take(some), clean[some]) * (len(some) / len(clean))
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
        optimiser.step()
        pending.append(loss)
        now, last = time.monotonic(), step + 1 == steps
        if on_progress is not None and (last or now - reported >= PROGRESS_SECONDS):
            reported = now
            left = (now - begun) / (step + 1 - len(done)) * (steps - step - 1)
            place = step // per_epoch + 1
            on_progress(Progress(job.role, place, job.phase.epochs, step + 1, steps, float(pending[-1]), left))
        due = save is not None and now - saved >= settings.train.checkpoint_minutes * 60
        if last or due:
            losses += torch.stack(pending).tolist()
            pending.clear()
            _check_finite(job.role, losses)
            if save is not None and not last:
                save(losses)
                saved = time.monotonic()
    return losses


def _check_finite(role: nets.Role, losses: list[float]) -> None:
    """A diverged training ends at its next checkpoint, which is not written. Raises ConfigError."""
    finite = np.isfinite(losses)
    if not finite.all():
        raise ConfigError(
            f"train.{role}: the loss became NaN or infinite at step {int(finite.argmin()) + 1}; lower learning_rate"
        )


def _batch_indices(job: _Job, seed: int, slices: int, step: int) -> Int64[Tensor, " B"]:
    """Which slices batch `step` holds: each epoch goes through all of them in a new order."""
    epoch, place = divmod(step, ceil(slices / job.phase.batch_size))
    shuffle = generator_for(seed, job.role, ORDER, epoch, torch.device("cpu"))
    order = torch.randperm(slices, generator=shuffle)
    return order[place * job.phase.batch_size : (place + 1) * job.phase.batch_size]


def _fingerprint(job: _Job, settings: LiverSettings, data: HealthySlices) -> str:
    """Digest of all that decides the weights: a checkpoint of anything else must not be resumed."""
    digest = hashlib.sha256(data.pixels.cpu().numpy().tobytes())
    digest.update(np.packbits(data.organ.cpu().numpy()).tobytes())
    parts = (
        job.role,
        job.net.model_dump_json(),
        job.phase.model_dump_json(),
        job.frozen,
        settings.synthesis.model_dump_json(),
        settings.train.focal.model_dump_json(),
        str(settings.train.mixed_precision),
        str(settings.seed),
        torch.__version__,
    )
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()


def _save_checkpoint(
    path: Path, fingerprint: str, net: nn.Module, optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"fingerprint": fingerprint, "net": net.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load_checkpoint(path: Path | None, fingerprint: str, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, or None when there is none, it is damaged, or it belongs to another training."""
    if path is None or not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError):
        return None
    if not isinstance(state, dict) or state.get("fingerprint") != fingerprint:
        return None
    return state
