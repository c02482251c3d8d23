"""Training of the two networks, in two phases or jointly.

In two phases, the restoration network is trained first. It is then frozen while the segmentation network is trained.
The thesis trains in two phases (Zhang, University of Alberta, 2024; section 3.3.2). Joint training, as in DRAEM, trains
both at once. All trainings share one loop.

Batch t of a phase is a pure function of (seed, phase, t). This includes its slices, noise and contrasts. On a CPU, a
run that was killed and resumed from its checkpoint therefore gives the same weights as an uninterrupted run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
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
from medad.base.storage import atomic_path, file_digest
from medad.config.liver import LiverSettings, NetSettings
from medad.networks import nets
from medad.networks.batches import BATCH, ORDER, HealthySlices, draw_batch, generator_for, load_slices
from medad.networks.checkpoint import Checkpoint, snapshot_name
from medad.networks.job import Job, fingerprint
from medad.networks.losses import focal_loss, l1_loss, l2_ssim_loss
from medad.networks.schedule import learning_rate, steps_per_epoch, total_epochs, total_steps

PROGRESS_SECONDS = 0.5


def train_restoration(
    prepared: Sequence[Path],
    settings: LiverSettings,
    out: Path,
    *,
    copies: Sequence[Path] = (),
    initial: Path | None = None,
    device: str = "auto",
    largest_batch: int | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Train phase one: restore healthy liver under a pseudo anomaly.

    Parameters
    ----------
    prepared
        Folders of healthy cases with prepared.safetensors.
    settings
        `restoration`, `synthesis`, `train` and `seed` are used. `train.restoration_loss` selects the loss.
    out
        Existing folder. model.safetensors and curve.json are written to it.
    copies
        Folders of copies with lesions, one for each of `prepared`. They are needed for synthesis kind `solid_lesions`.
    initial
        Folder of a network of the same settings, whose weights are the initial ones. None: they are random.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    largest_batch
        Most slices that go through the network at a time. If it is smaller than the batch, gradients of the parts are
        added up. The result is the same up to rounding and needs less memory.
    checkpoint
        File for resuming: written every `checkpoint_minutes`, read at the start if it exists, removed at the end.
    on_progress
        Function called at most twice a second, and after the last step.

    Raises
    ------
    ConfigError
        The loss is not finite, or the network in `initial` has other settings.
    InputError
        A file is missing or damaged.
    """

    def loss(trained: nn.ModuleDict, batch: Synthesised, clean: Tensor) -> Tensor:
        return _restoration_loss(nets.restore(trained["restoration"], batch.image / 255), clean, settings)

    phase = settings.train.restoration
    job = Job("restoration", {"restoration": settings.restoration}, phase, loss, copies=copies, initial=initial)
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
    copies: Sequence[Path] = (),
    initial: Path | None = None,
    device: str = "auto",
    largest_batch: int | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Train phase two: segment the pseudo anomaly from query and restoration. The restoration network is frozen.

    `restoration` is the folder that phase one wrote. The other parameters are as in `train_restoration`, with
    `segmentation` settings. With `train.snapshot_epochs`, snapshot-NNNN.safetensors files are also written to `out`.
    Each is the network that a training of NNNN epochs would have given.
    """
    place = pick_device(device)
    frozen_file = restoration / "model.safetensors"
    restorer = (
        nets.fold_standardisation(nets.load(frozen_file, "restoration")[0]).to(place).eval().requires_grad_(False)
    )

    def loss(trained: nn.ModuleDict, batch: Synthesised, clean: Tensor) -> Tensor:
        query = batch.image / 255
        with torch.no_grad():
            restored = nets.restore(restorer, query).to(query.dtype)
        logits = nets.segment_logits(trained["segmentation"], restored, query)
        return focal_loss(logits, batch.mask, settings.train.focal)

    phase = settings.train.segmentation
    job = Job(
        "segmentation",
        {"segmentation": settings.segmentation},
        phase,
        loss,
        frozen=file_digest(frozen_file),
        snapshots=_snapshot_epochs(settings.train.snapshot_epochs, phase.epochs),
        copies=copies,
        initial=initial,
    )
    _run(job, prepared, settings, place, largest_batch, out, checkpoint, on_progress)


def _snapshot_epochs(every: int, epochs: int) -> tuple[int, ...]:
    """Return the epochs after which a snapshot is taken: every `every` epochs, and the last."""
    return (*range(every, epochs, every), epochs) if every else ()


def train_joint(
    prepared: Sequence[Path],
    settings: LiverSettings,
    out: Path,
    *,
    copies: Sequence[Path] = (),
    device: str = "auto",
    largest_batch: int | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Train both networks at once, as DRAEM does.

    The loss is restoration loss + focal loss. Gradients of the focal loss also reach the restoration network.
    `train.restoration` sets epochs, batch size and learning rate. For a given seed, both networks have the same initial
    weights as in two phases, and the batches are those of phase one. So the two schedules can be compared fairly.
    restoration/ and segmentation/ are written to `out`, each with model.safetensors and the same curve.json. The other
    parameters are as in `train_restoration`.
    """

    def loss(trained: nn.ModuleDict, batch: Synthesised, clean: Tensor) -> Tensor:
        query = batch.image / 255
        restored = nets.restore(trained["restoration"], query).to(query.dtype)
        logits = nets.segment_logits(trained["segmentation"], restored, query)
        focal = focal_loss(logits, batch.mask, settings.train.focal)
        return _restoration_loss(restored, clean, settings) + focal

    both: dict[nets.Role, NetSettings] = {"restoration": settings.restoration, "segmentation": settings.segmentation}
    job = Job("joint", both, settings.train.restoration, loss, copies=copies)
    _run(job, prepared, settings, pick_device(device), largest_batch, out, checkpoint, on_progress)


def _run(
    job: Job,
    prepared: Sequence[Path],
    settings: LiverSettings,
    device: torch.device,
    largest_batch: int | None,
    out: Path,
    checkpoint: Path | None,
    on_progress: OnProgress | None,
) -> None:
    """Train a job's networks from their initial weights or their checkpoint, and write them."""
    keep_freed_memory()
    started = time.monotonic()
    data = load_slices(prepared, device, job.copies)
    textures = None
    if settings.synthesis.kind == "perlin_texture":
        textures = open_textures(settings.synthesis.texture, data.pixels.shape[-1])
    trained = nn.ModuleDict()
    for role, shape in job.net_settings.items():
        trained[role] = job.initial_net(role, shape, settings.seed).to(device)
    if device.type == "cuda":
        trained = trained.to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(trained.parameters(), lr=job.phase.learning_rate)
    saved_state = None if checkpoint is None else Checkpoint(checkpoint, fingerprint(job, settings, data, textures))
    per_epoch = steps_per_epoch(job.phase, len(data.pixels))
    earlier_losses = [] if saved_state is None else _resume(saved_state, job, trained, optimiser, per_epoch, device)

    def snapshot(epoch: int) -> None:
        path = out / snapshot_name(epoch) if saved_state is None else saved_state.snapshot_path(epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            nets.save(temporary, trained[job.random_stream], job.random_stream, job.net_settings[job.random_stream])

    save = None if saved_state is None else partial(saved_state.save, trained, optimiser)
    part = min(largest_batch or job.phase.batch_size, job.phase.batch_size)
    with flush_denormals():
        losses = _fit(
            job, trained, optimiser, data, textures, settings, part, earlier_losses, on_progress, save, snapshot
        )
    curve = {
        "phase": job.name,
        "epochs": total_epochs(job.phase, len(data.pixels)),
        "steps_per_epoch": per_epoch,
        "slices": len(data.pixels),
        "steps": list(range(1, len(losses) + 1)),
        "loss": losses,
        "seconds": round(time.monotonic() - started, 3),
        "resumed_at_step": len(earlier_losses),
        "device": str(device),
        "restoration_loss": settings.train.restoration_loss,
    }
    for role, shape in job.net_settings.items():
        folder = out if len(job.net_settings) == 1 else out / role
        folder.mkdir(exist_ok=True)
        nets.save(folder / nets.MODEL, trained[role], role, shape)
        (folder / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
    if saved_state is not None:
        saved_state.finish(job.snapshots, out)


def _resume(
    saved_state: Checkpoint,
    job: Job,
    trained: nn.Module,
    optimiser: torch.optim.Optimizer,
    per_epoch: int,
    device: torch.device,
) -> list[float]:
    """Restore networks and optimiser from a checkpoint and return the losses so far.

    Return an empty list without a usable checkpoint.
    """
    state = saved_state.load(device)
    if state is None:
        return []
    losses: list[float] = state["losses"]
    if not saved_state.has_snapshots([epoch for epoch in job.snapshots if epoch * per_epoch <= len(losses)]):
        return []
    trained.load_state_dict(state["net"])
    optimiser.load_state_dict(state["optimiser"])
    return losses


def _fit(
    job: Job,
    trained: nn.ModuleDict,
    optimiser: torch.optim.Optimizer,
    data: HealthySlices,
    textures: Textures | None,
    settings: LiverSettings,
    part: int,
    earlier_losses: list[float],
    on_progress: OnProgress | None,
    save: Callable[[list[float]], None] | None,
    snapshot: Callable[[int], None],
) -> list[float]:
    """Train after `earlier_losses`, with `part` slices at a time, and return the loss of every step."""
    device = data.pixels.device
    per_epoch = steps_per_epoch(job.phase, len(data.pixels))
    steps, epochs = total_steps(job.phase, len(data.pixels)), total_epochs(job.phase, len(data.pixels))
    losses, pending = list(earlier_losses), list[Tensor]()  # losses stay on the device until they are needed
    begun = reported = saved = time.monotonic()
    autocast = settings.train.mixed_precision and device.type == "cuda"
    trained.train()
    for step in range(len(earlier_losses), steps):
        chosen = _batch_indices(job, settings.seed, len(data.pixels), step).to(device)
        generator = generator_for(settings.seed, job.random_stream, BATCH, step, device)
        batch, clean = draw_batch(data, chosen, settings, generator, textures)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(job.phase, step, steps)
        optimiser.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for indices in torch.split(torch.arange(len(clean), device=device), part):
            with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
                # all losses are means over pixels, and every slice has the same number of pixels
                share = job.loss(trained, batch.take(indices), clean[indices]) * (len(indices) / len(clean))
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
        optimiser.step()
        pending.append(loss)
        epoch, remainder = divmod(step + 1, per_epoch)
        if remainder == 0 and epoch in job.snapshots:
            snapshot(epoch)
        now, last = time.monotonic(), step + 1 == steps
        if on_progress is not None and (last or now - reported >= PROGRESS_SECONDS):
            reported = now
            left = (now - begun) / (step + 1 - len(earlier_losses)) * (steps - step - 1)
            place = step // per_epoch + 1
            on_progress(Progress(job.name, place, epochs, step + 1, steps, float(pending[-1]), left))
        due = save is not None and now - saved >= settings.train.checkpoint_minutes * 60
        if last or due:
            losses += torch.stack(pending).tolist()
            pending.clear()
            _check_finite(job.random_stream, losses)
            if save is not None and not last:
                save(losses)
                saved = time.monotonic()
    return losses


def _check_finite(role: nets.Role, losses: list[float]) -> None:
    """Raise ConfigError if a loss is not finite. A diverged training thus writes no further checkpoint."""
    finite = np.isfinite(losses)
    if not finite.all():
        raise ConfigError(
            f"train.{role}: the loss became NaN or infinite at step {int(finite.argmin()) + 1}; lower learning_rate"
        )


def _batch_indices(job: Job, seed: int, slices: int, step: int) -> Int64[Tensor, " B"]:
    """Return the slices of batch `step`. Each epoch visits all slices in a new random order."""
    epoch, place = divmod(step, steps_per_epoch(job.phase, slices))
    shuffle = generator_for(seed, job.random_stream, ORDER, epoch, torch.device("cpu"))
    order = torch.randperm(slices, generator=shuffle)
    return order[place * job.phase.batch_size : (place + 1) * job.phase.batch_size]
