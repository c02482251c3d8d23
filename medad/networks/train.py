"""Two-phase training: the restoration network first, then, frozen, the segmentation network on top (000, 3.3.2).

Joint training, DRAEM's and so the baseline's, fits both at once. One loop serves all. Batch t of a phase is a pure
function of (seed, phase, t): which slices, which noise, which contrast. So a run killed at any step and resumed from
its checkpoint is, on a CPU, the run that was never killed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil, cos, pi
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from medad.anomalies.synthesis import Synthesised
from medad.anomalies.textures import Textures, open_textures
from medad.base.devices import flush_denormals, keep_freed_memory, pick_device
from medad.base.errors import ConfigError
from medad.base.progress import OnProgress, Progress
from medad.base.storage import atomic_path
from medad.config.liver import LiverSettings, NetSettings, PhaseSettings
from medad.networks import nets
from medad.networks.batches import BATCH, INITIAL, ORDER, HealthySlices, draw_batch, generator_for, load_slices
from medad.networks.checkpoint import Checkpoint, snapshot_name
from medad.networks.losses import focal_loss, l1_loss, l2_ssim_loss

PROGRESS_SECONDS = 0.5
RISE, FIRST_RATE = 0.3, 25
"""Of a one-cycle rate: the share of steps in which it rises, and the fraction of its peak that it begins at."""


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
        `restoration`, `synthesis`, `train` and `seed` are used; `train.restoration_loss` says what is minimised.
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

    def loss(trained: nn.ModuleDict, batch: Synthesised, clean: Tensor) -> Tensor:
        return _restoration_loss(nets.restore(trained["restoration"], batch.image / 255), clean, settings)

    job = _Job("restoration", {"restoration": settings.restoration}, settings.train.restoration, loss)
    _run(job, prepared, settings, pick_device(device), largest_batch, out, checkpoint, on_progress)


def _restoration_loss(restored: Tensor, clean: Tensor, settings: LiverSettings) -> Tensor:
    loss = l2_ssim_loss if settings.train.restoration_loss == "l2_ssim" else l1_loss
    return loss(restored.float(), clean / 255)


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
    With `train.snapshot_epochs`, `out` also gets snapshot-NNNN.safetensors, NNNN whole epochs each: the network that a
    training of so many epochs would have ended with.
    """
    place = pick_device(device)
    frozen_file = restoration / "model.safetensors"
    restorer = nets.bake(nets.load(frozen_file, "restoration")[0]).to(place).eval().requires_grad_(False)

    def loss(trained: nn.ModuleDict, batch: Synthesised, clean: Tensor) -> Tensor:
        query = batch.image / 255
        with torch.no_grad():
            restored = nets.restore(restorer, query).to(query.dtype)
        logits = nets.segment_logits(trained["segmentation"], restored, query)
        return focal_loss(logits, batch.mask, settings.train.focal)

    phase = settings.train.segmentation
    job = _Job(
        "segmentation",
        {"segmentation": settings.segmentation},
        phase,
        loss,
        frozen=hashlib.sha256(frozen_file.read_bytes()).hexdigest(),
        snapshots=_snapshot_epochs(settings.train.snapshot_epochs, phase.epochs),
    )
    _run(job, prepared, settings, place, largest_batch, out, checkpoint, on_progress)


def _snapshot_epochs(every: int, epochs: int) -> tuple[int, ...]:
    """After which epochs a snapshot is taken: every so many, and the last."""
    return (*range(every, epochs, every), epochs) if every else ()


def train_joint(
    prepared: Sequence[Path],
    settings: LiverSettings,
    out: Path,
    *,
    device: str = "auto",
    largest_batch: int | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Both networks at once, as DRAEM does: restoration loss + focal loss, the latter also through the restoration.

    `train.restoration` says how long and how fast. At one seed both networks start from the weights they start from in
    two phases, and the batches are those of phase one, so that the schedules are compared on equal terms. `out` gets
    restoration/ and segmentation/, each with model.safetensors and the one curve.json; the rest as in
    `train_restoration`.
    """

    def loss(trained: nn.ModuleDict, batch: Synthesised, clean: Tensor) -> Tensor:
        query = batch.image / 255
        restored = nets.restore(trained["restoration"], query).to(query.dtype)
        logits = nets.segment_logits(trained["segmentation"], restored, query)
        focal = focal_loss(logits, batch.mask, settings.train.focal)
        return _restoration_loss(restored, clean, settings) + focal

    both: dict[nets.Role, NetSettings] = {"restoration": settings.restoration, "segmentation": settings.segmentation}
    job = _Job("joint", both, settings.train.restoration, loss)
    _run(job, prepared, settings, pick_device(device), largest_batch, out, checkpoint, on_progress)


@dataclass(frozen=True)
class _Job:
    """What differs between trainings.

    Attributes
    ----------
    name
        What reports and progress call it.
    shapes
        The networks to train; the first one's name also names the stream of random numbers.
    frozen
        Names the weights that the loss holds fixed.
    snapshots
        After which epochs the network is kept, ascending.
    """

    name: str
    shapes: Mapping[nets.Role, NetSettings]
    phase: PhaseSettings
    loss: Callable[[nn.ModuleDict, Synthesised, Tensor], Tensor]
    frozen: str = ""
    snapshots: tuple[int, ...] = ()

    @property
    def stream(self) -> nets.Role:
        return next(iter(self.shapes))

    def steps_per_epoch(self, slices: int) -> int:
        return ceil(slices / self.phase.batch_size)


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
    """Fit a job's networks from their start or their checkpoint, and write them."""
    keep_freed_memory()
    started = time.monotonic()
    data = load_slices(prepared, device)
    textures = None
    if settings.synthesis.kind == "perlin_texture":
        textures = open_textures(settings.synthesis.texture, data.pixels.shape[-1])
    trained = nn.ModuleDict()
    for role, shape in job.shapes.items():
        initial = generator_for(settings.seed, role, INITIAL, 0, torch.device("cpu"))
        trained[role] = nets.build(role, shape, initial).to(device)
    if device.type == "cuda":
        trained = trained.to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(trained.parameters(), lr=job.phase.learning_rate)
    kept = None if checkpoint is None else Checkpoint(checkpoint, _fingerprint(job, settings, data, textures))
    per_epoch = job.steps_per_epoch(len(data.pixels))
    done = [] if kept is None else _resume(kept, job, trained, optimiser, per_epoch, device)

    def snapshot(epoch: int) -> None:
        path = out / snapshot_name(epoch) if kept is None else kept.snapshot(epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            nets.save(temporary, trained[job.stream], job.stream, job.shapes[job.stream])

    save = None if kept is None else partial(kept.save, trained, optimiser)
    part = min(largest_batch or job.phase.batch_size, job.phase.batch_size)
    with flush_denormals():
        losses = _fit(job, trained, optimiser, data, textures, settings, part, done, on_progress, save, snapshot)
    curve = {
        "phase": job.name,
        "epochs": job.phase.epochs,
        "steps_per_epoch": per_epoch,
        "slices": len(data.pixels),
        "steps": list(range(1, len(losses) + 1)),
        "loss": losses,
        "seconds": round(time.monotonic() - started, 3),
        "resumed_at_step": len(done),
        "device": str(device),
        "restoration_loss": settings.train.restoration_loss,
    }
    for role, shape in job.shapes.items():
        folder = out if len(job.shapes) == 1 else out / role
        folder.mkdir(exist_ok=True)
        nets.save(folder / nets.MODEL, trained[role], role, shape)
        (folder / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
    if kept is not None:
        kept.conclude(job.snapshots, out)


def _resume(
    kept: Checkpoint,
    job: _Job,
    trained: nn.Module,
    optimiser: torch.optim.Optimizer,
    per_epoch: int,
    device: torch.device,
) -> list[float]:
    """Put networks and optimiser where a checkpoint left them; the losses so far, none where there is nothing fit."""
    state = kept.load(device)
    if state is None:
        return []
    losses: list[float] = state["losses"]
    if not kept.has_snapshots([epoch for epoch in job.snapshots if epoch * per_epoch <= len(losses)]):
        return []
    trained.load_state_dict(state["net"])
    optimiser.load_state_dict(state["optimiser"])
    return losses


def _fit(
    job: _Job,
    trained: nn.ModuleDict,
    optimiser: torch.optim.Optimizer,
    data: HealthySlices,
    textures: Textures | None,
    settings: LiverSettings,
    part: int,
    done: list[float],
    on_progress: OnProgress | None,
    save: Callable[[list[float]], None] | None,
    snapshot: Callable[[int], None],
) -> list[float]:
    """The loop of all trainings, from step len(done) on, `part` slices at a time; returns every step's loss."""
    device = data.pixels.device
    per_epoch = job.steps_per_epoch(len(data.pixels))
    steps = per_epoch * job.phase.epochs
    losses, pending = list(done), list[Tensor]()  # losses stay on the device until someone looks
    begun = reported = saved = time.monotonic()
    autocast = settings.train.mixed_precision and device.type == "cuda"
    trained.train()
    for step in range(len(done), steps):
        chosen = _batch_indices(job, settings.seed, len(data.pixels), step).to(device)
        generator = generator_for(settings.seed, job.stream, BATCH, step, device)
        batch, clean = draw_batch(data, chosen, settings, generator, textures)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(job.phase, step, steps)
        optimiser.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for some in torch.split(torch.arange(len(clean), device=device), part):
            with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
                # all losses are means over pixels, of which each slice has as many
                share = job.loss(trained, batch.take(some), clean[some]) * (len(some) / len(clean))
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
        optimiser.step()
        pending.append(loss)
        epoch, rest = divmod(step + 1, per_epoch)
        if rest == 0 and epoch in job.snapshots:
            snapshot(epoch)
        now, last = time.monotonic(), step + 1 == steps
        if on_progress is not None and (last or now - reported >= PROGRESS_SECONDS):
            reported = now
            left = (now - begun) / (step + 1 - len(done)) * (steps - step - 1)
            place = step // per_epoch + 1
            on_progress(Progress(job.name, place, job.phase.epochs, step + 1, steps, float(pending[-1]), left))
        due = save is not None and now - saved >= settings.train.checkpoint_minutes * 60
        if last or due:
            losses += torch.stack(pending).tolist()
            pending.clear()
            _check_finite(job.stream, losses)
            if save is not None and not last:
                save(losses)
                saved = time.monotonic()
    return losses


def learning_rate(phase: PhaseSettings, step: int, steps: int) -> float:
    """Of step `step` of 0..steps-1: a function of its place alone, so that a resumed training goes on with it."""
    if phase.rate == "constant":
        return phase.learning_rate
    peak = max(round(RISE * steps), 1)
    if step < peak:
        start = phase.learning_rate / FIRST_RATE
        return start + (phase.learning_rate - start) * (1 - cos(pi * step / peak)) / 2
    return phase.learning_rate * (1 + cos(pi * (step - peak) / max(steps - peak, 1))) / 2


def _check_finite(role: nets.Role, losses: list[float]) -> None:
    """A diverged training ends at its next checkpoint, which is not written. Raises ConfigError."""
    finite = np.isfinite(losses)
    if not finite.all():
        raise ConfigError(
            f"train.{role}: the loss became NaN or infinite at step {int(finite.argmin()) + 1}; lower learning_rate"
        )


def _batch_indices(job: _Job, seed: int, slices: int, step: int) -> Int64[Tensor, " B"]:
    """Which slices batch `step` holds: each epoch goes through all of them in a new order."""
    epoch, place = divmod(step, job.steps_per_epoch(slices))
    shuffle = generator_for(seed, job.stream, ORDER, epoch, torch.device("cpu"))
    order = torch.randperm(slices, generator=shuffle)
    return order[place * job.phase.batch_size : (place + 1) * job.phase.batch_size]


def _fingerprint(job: _Job, settings: LiverSettings, data: HealthySlices, textures: Textures | None) -> str:
    """Digest of all that decides the weights: a checkpoint of anything else must not be resumed."""
    digest = hashlib.sha256(data.pixels.cpu().numpy().tobytes())
    digest.update(np.packbits(data.organ.cpu().numpy()).tobytes())
    parts = (
        job.name,
        *(shape.model_dump_json() for shape in job.shapes.values()),
        job.phase.model_dump_json(),
        job.frozen,
        settings.synthesis.model_dump_json(exclude={"texture": {"folder"}}),
        "" if settings.train.augmentation is None else settings.train.augmentation.model_dump_json(),
        str(settings.train.flip),
        str((data.pixel_mm.tolist(), data.grey_per_hu)),
        "" if textures is None else textures.digest,
        settings.train.focal.model_dump_json(),
        settings.train.restoration_loss,
        str(settings.train.mixed_precision),
        str(settings.seed),
        torch.__version__,
    )
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()
