"""Step that trains the learned systems (APRIL-GAN, AnomalyCLIP) on features of auxiliary images.

The encoder is frozen and its image tower does not run here. `zsad.steps.encode.encode_images` has already written its
outputs to disk. Batch t of an epoch depends only on (seed, epoch, t). So a training that is killed and resumed from
its last epoch gives, on a CPU, the same weights as an uninterrupted training.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from medad.base.devices import pick_device
from medad.base.errors import ConfigError, InputError
from medad.base.progress import OnProgress, Progress
from medad.base.storage import atomic_path
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import FeatureStore, read_text
from zsad.config.run import EncoderSettings
from zsad.config.system_base import Training
from zsad.data.images import mask_to_canvas
from zsad.data.labelled import LabelledImage
from zsad.data.masks import check_mask, read_mask
from zsad.scorers.anomalyclip.score import AnomalyClipLearner, check_tower, object_words, prompt_ids
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.april_gan.score import AprilGanLearner, width_of
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.learned import Batch, Learner, Weights, patches_of
from zsad.scorers.weights_file import CHECKPOINT, Checkpoint, CheckpointMetadata, attention_settings_of
from zsad.steps.results import Source

CURVE = "training.json"
PROGRESS_SECONDS = 0.5
BETAS = (0.5, 0.999)
"""Decay rates of Adam, as in the public code of both APRIL-GAN and AnomalyCLIP."""
INITIAL, ORDER = 0, 1  # purpose of a random generator


@dataclass(frozen=True)
class _Crop:
    source: int
    number: int
    """Number of the image in its source's features."""
    place: int
    """Number of the crop in its image."""
    mask: UInt8[np.ndarray, " bytes"]
    """Mask as packed bits, at crop size: 1/8 byte per pixel, so that all masks fit into memory."""


@dataclass
class TrainingData:
    """Crops to learn from. Their features stay on disk and are read batch by batch."""

    stores: list[FeatureStore] = field(default_factory=list)
    crops: list[_Crop] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Digest of each anomalous image that could not be used, with the reason."""
    images: int = 0

    @property
    def size_px(self) -> int:
        return self.stores[0].size_px

    def mask(self, crop: _Crop) -> Bool[np.ndarray, "S S"]:
        side = self.size_px
        return np.unpackbits(crop.mask, count=side * side).view(bool).reshape(side, side)

    def batch(self, chosen: Sequence[int], reads: Sequence[str], device: torch.device) -> Batch:
        """Read a batch of crops, chosen by number. Raise InputError if features are damaged."""
        crops = [self.crops[i] for i in chosen]

        def stacked(values: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(values)).to(device)

        return Batch(
            class_tokens=stacked([self.stores[c.source].class_tokens(c.number)[c.place] for c in crops]),
            patches={
                name: stacked([patches_of(self.stores[c.source], c.number, name)[c.place] for c in crops])
                for name in reads
            },
            masks=stacked([torch.from_numpy(self.mask(c)) for c in crops]),
            sources=torch.tensor([c.source for c in crops], device=device),
        )


def gather_crops(sources: Sequence[Source[Path]]) -> TrainingData:
    """Read the labels and masks of all sources. Each crop gets its own part of the mask.

    Images without a label are ignored. An anomalous image without a usable mask is left out and recorded, because the
    labels of its crops are unknown.

    Raises
    ------
    InputError
        Features are missing or from different encoders, or all crops are normal, or all are anomalous.
    """
    data = TrainingData()
    for place, source in enumerate(sources):
        store = FeatureStore(source.features)
        data.stores.append(store)
        if store.index.identity != data.stores[0].index.identity or store.size_px != data.size_px:
            raise InputError(source.features, "these features were made with another encoder than other categories'")
        numbers = {digest: number for number, digest in enumerate(store.digests)}
        items = {item.sha256: item for item in source.items if item.anomalous is not None and item.sha256 in numbers}
        for digest in sorted(items):
            number = numbers[digest]
            try:
                masks = _crop_masks(items[digest], store, number)
            except InputError as error:
                data.left_out.append({"sha256": digest, "rule": error.rule})
                continue
            data.images += 1
            data.crops += [_Crop(place, number, i, np.packbits(mask)) for i, mask in enumerate(masks)]
    anomalous = sum(bool(crop.mask.any()) for crop in data.crops)
    if not anomalous or anomalous == len(data.crops):
        kind = "anomalous image with a mask" if not anomalous else "normal image"
        raise InputError("training data", f"contains no {kind} to learn from")
    return data


def _crop_masks(item: LabelledImage, store: FeatureStore, number: int) -> list[Bool[np.ndarray, "S S"]]:
    crops, image, side = store.crops(number), store.images[number], store.size_px
    if not item.anomalous:
        return [np.zeros((side, side), dtype=bool)] * len(crops.offsets)
    if item.mask is None:
        raise InputError("mask", "the image is labelled anomalous but has no mask")
    mask = read_mask(item.mask, (image.height, image.width))
    check_mask(mask, item.mask)
    canvas = mask_to_canvas(mask, crops.canvas_hw)
    return [canvas[top : top + side, left : left + side] for top, left in crops.offsets]


def train_system(
    system: AprilGan | AnomalyClip,
    sources: Sequence[Source[Path]],
    encoder: EncoderSettings,
    device: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    largest_batch: int | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Train a system. Write `checkpoint.safetensors` and `training.json` into `out`.

    Parameters
    ----------
    system
        Settings of the system.
    sources
        Auxiliary categories. Their order does not change the result.
    encoder
        Settings of the model that made the features.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    out
        Output folder, created if it does not exist.
    checkpoint
        File for the state of the training, written after each epoch. If the training is killed, the same training
        resumes from it. It is removed at the end.
    largest_batch
        Largest number of crops processed at a time. If it is smaller than a batch, the gradients of the parts are
        summed. The result is the same up to rounding and needs less memory.
    on_progress
        Function called at most twice per second, and after each epoch.

    Raises
    ------
    ConfigError
        The model cannot be loaded or cannot be used for this system, or the loss is NaN or infinite.
    InputError
        Features or text are missing or damaged, or no mask can be used.
    DiskFullError
        The disk is full.
    """
    place = pick_device(device)
    ordered = sorted(sources, key=lambda source: (source.name, str(source.features)))
    data = gather_crops(ordered)
    learner = make_learner(system, ordered, data, encoder, place)
    metadata = CheckpointMetadata(
        system=system,
        encoder=data.stores[0].index.identity,
        paths=attention_settings_of(encoder) if isinstance(system, AnomalyClip) else None,
    )
    fingerprint = _fingerprint(metadata, ordered, data)
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    fitted = fit(
        learner,
        data,
        system.training,
        place,
        title=system.title,
        checkpoint=checkpoint,
        fingerprint=fingerprint,
        largest_batch=largest_batch,
        on_progress=on_progress,
    )
    Checkpoint(metadata, fitted.weights).write(out / CHECKPOINT)
    curve = {
        "system": system.title,
        "images": data.images,
        "crops": len(data.crops),
        "anomalous_crops": sum(bool(crop.mask.any()) for crop in data.crops),
        "left_out": data.left_out,
        "epochs": system.training.epochs,
        "steps_per_epoch": ceil(len(data.crops) / system.training.batch_size),
        "loss": fitted.losses,
        "seconds": round(time.monotonic() - started, 3),
        "resumed_at_epoch": fitted.resumed_at,
        "device": str(place),
    }
    with atomic_path(out / CURVE) as path:
        path.write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def make_learner(
    system: AprilGan | AnomalyClip,
    sources: Sequence[Source[Path]],
    data: TrainingData,
    encoder: EncoderSettings,
    device: torch.device,
) -> Learner:
    """Return the learner that trains a system on these sources, in their order. Raise ConfigError and InputError."""
    if isinstance(system, AprilGan):
        if any(source.text is None for source in sources):
            raise ConfigError(f"{system.title} needs text features, but a category has none")
        texts = torch.stack([read_text(source.text) for source in sources if source.text is not None])
        return AprilGanLearner(system, texts.to(device), width_of(data.stores[0], system))
    model = Encoder.load(encoder, device)
    if json.loads(json.dumps(model.identity)) != data.stores[0].index.identity:
        raise InputError(sources[0].features, f"these features were made with another encoder, not {model.description}")
    check_tower(model, system)
    return AnomalyClipLearner(system, model, prompt_ids(model, [object_words(s.name, system) for s in sources], system))


@dataclass
class Fitted:
    """Trained weights, the loss of each step, and the epoch (from 0) at which a saved state was resumed."""

    weights: Weights
    losses: list[float]
    resumed_at: int


def fit(
    learner: Learner,
    data: TrainingData,
    training: Training,
    device: torch.device,
    *,
    title: str = "training",
    checkpoint: Path | None = None,
    fingerprint: str = "",
    largest_batch: int | None = None,
    on_progress: OnProgress | None = None,
) -> Fitted:
    """Run Adam over batches. Seed and epoch determine their order. See `train_system`."""
    weights = {
        name: value.to(device).requires_grad_()
        for name, value in learner.initial(_generator(training.seed, INITIAL)).items()
    }
    names = sorted(weights)
    optimiser = torch.optim.Adam([weights[name] for name in names], lr=training.learning_rate, betas=BETAS)
    losses: list[float] = []
    if (state := _load_state(checkpoint, fingerprint)) is not None:
        with torch.no_grad():
            for name in names:
                weights[name].copy_(state["weights"][name])
        optimiser.load_state_dict(state["optimiser"])
        losses = state["losses"]
    per_epoch = ceil(len(data.crops) / training.batch_size)
    first = len(losses) // per_epoch
    part = min(largest_batch or training.batch_size, training.batch_size)
    begun = reported = time.monotonic()
    for epoch in range(first, training.epochs):
        order = torch.randperm(len(data.crops), generator=_generator(training.seed, ORDER, epoch)).tolist()
        pending: list[Tensor] = []  # losses stay on the device until the end of the epoch
        for step in range(per_epoch):
            chosen = order[step * training.batch_size : (step + 1) * training.batch_size]
            optimiser.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=device)
            for at in range(0, len(chosen), part):
                some = chosen[at : at + part]
                # all losses are means over crops, or over pixels, and all crops have the same number of pixels
                share = learner.loss(weights, data.batch(some, learner.reads, device)) * (len(some) / len(chosen))
                torch.autograd.backward(share)
                loss += share.detach()
            optimiser.step()
            pending.append(loss)
            now, done = time.monotonic(), epoch * per_epoch + step + 1
            if on_progress is not None and (step + 1 == per_epoch or now - reported >= PROGRESS_SECONDS):
                reported = now
                steps = per_epoch * training.epochs
                left = (now - begun) / (done - first * per_epoch) * (steps - done)
                on_progress(Progress(title, epoch + 1, training.epochs, done, steps, float(loss), left))
        losses += torch.stack(pending).tolist()
        if not np.isfinite(losses).all():
            raise ConfigError(f"{title}: the loss became NaN or infinite in epoch {epoch + 1}; lower learning_rate")
        if checkpoint is not None and epoch + 1 < training.epochs:
            _save_state(checkpoint, fingerprint, {name: weights[name].detach() for name in names}, optimiser, losses)
    return Fitted({name: weights[name].detach() for name in names}, losses, first)


def _generator(seed: int, *purpose: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, *purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _fingerprint(metadata: CheckpointMetadata, sources: Sequence[Source[Path]], data: TrainingData) -> str:
    """Return the digest of everything that affects the weights. Only a state with the same digest may be resumed."""
    digest = hashlib.sha256(metadata.to_json().encode())
    digest.update(torch.__version__.encode())
    for source in sources:
        digest.update(f"\n{source.name}".encode())
        if source.text is not None:
            digest.update(read_text(source.text).numpy().tobytes())
    for crop in data.crops:
        digest.update(f"\n{crop.source} {data.stores[crop.source].digests[crop.number]} {crop.place} ".encode())
        digest.update(crop.mask.tobytes())
    return digest.hexdigest()


def _save_state(
    path: Path, fingerprint: str, weights: Weights, optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"fingerprint": fingerprint, "weights": weights, "optimiser": optimiser.state_dict(), "losses": losses}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load_state(path: Path | None, fingerprint: str) -> dict[str, Any] | None:
    """Load the saved state. Return None if it is missing, damaged, or belongs to another training."""
    if path is None or not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("fingerprint") == fingerprint else None
