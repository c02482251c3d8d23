"""Trained weights of a learned system on disk: a safetensors file with metadata.

The metadata contain the system's settings and the encoder's identity. For weights trained on V-V patches, they also say
how the patches were made. They contain no path and nothing about the images.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medad.base.errors import ConfigError, InputError
from medad.base.storage import atomic_path, reading
from zsad.config.run import EncoderSettings
from zsad.config.system_base import VIT_L_BLOCKS
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.interface import CategoryFeatures
from zsad.scorers.learned import Weights

CHECKPOINT = "checkpoint.safetensors"
METADATA = "adflows"
SCHEMA: Literal["adflows zsad learned 1"] = "adflows zsad learned 1"
OFFICIAL_SUFFIXES = (".pth", ".pt")
OFFICIAL_KEY, APRIL_GAN_KEY = "prompt_learner", "trainable_linearlayer"
FULL_STOP = 269
"""Token of a full stop at the end of a word, in CLIP's vocabulary."""
_PRIVATE = {"checkpoint", "label", "encoder"}
_ATTENTION_SETTINGS = ("vv_blocks", "vv_feed_forward", "vv_temperature", "vv_attention", "class_ln_post")


class CheckpointMetadata(BaseModel):
    """Metadata of trained weights: the system, encoder and attention settings that they belong to."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_name: Literal["adflows zsad learned 1"] = Field(default=SCHEMA, alias="schema")
    system: Annotated[AprilGan | AnomalyClip, Field(discriminator="system")]
    encoder: dict[str, Any] | None
    """Identity of the encoder. None if it is unknown, for example for imported weights."""
    paths: dict[str, Any] | None
    """Settings of the attention path for V-V patches and class tokens. None: irrelevant or unknown."""

    def to_json(self) -> str:
        """Return the metadata as JSON, without private fields and fields that have no effect."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"system": _PRIVATE})
        return json.dumps(content, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Trained weights with their metadata."""

    metadata: CheckpointMetadata
    weights: Weights

    def write(self, path: Path) -> None:
        """Write the file completely or not at all. Raise DiskFullError."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.weights.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA: self.metadata.to_json()})


def attention_settings_of(settings: EncoderSettings) -> dict[str, Any]:
    """Return the encoder settings that decide how V-V patches and class tokens are made, ready for JSON."""
    return settings.model_dump(mode="json", include=set(_ATTENTION_SETTINGS))


def read_checkpoint(path: Path, blocks: Sequence[int] = VIT_L_BLOCKS) -> Checkpoint:
    """Read a file of `Checkpoint.write`, or a public checkpoint (.pth, see `import_official`).

    Parameters
    ----------
    path
        The file.
    blocks
        Blocks of the layers in a public checkpoint of APRIL-GAN, which does not name them.

    Raises
    ------
    InputError
        The file is missing, damaged, or of another kind.
    """
    if path.suffix.lower() in OFFICIAL_SUFFIXES:
        return import_official(path, blocks)
    try:
        with reading(path), safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(METADATA)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if stored is None:
            raise InputError(path, "is not a checkpoint of a trained system: its metadata name no system")
        return Checkpoint(CheckpointMetadata.model_validate_json(stored), weights)
    except SafetensorError as error:
        raise InputError(path, "is not a safetensors file, or is cut short") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(path, f"is not a checkpoint that this version can read: {where}: {first['msg']}") from error


def import_official(path: Path, blocks: Sequence[int] = VIT_L_BLOCKS) -> Checkpoint:
    """Read a checkpoint in the public layout of AnomalyCLIP or APRIL-GAN.

    APRIL-GAN: a state dict of its linear layers, as the whole file or as its entry `trainable_linearlayer`.
    `fc.i.weight`, [D W], and `fc.i.bias`, [D], belong to the i-th of `blocks`.

    AnomalyCLIP: a state dict of its prompt learner, as the whole file or as its entry `prompt_learner`. `ctx_pos` and
    `ctx_neg`, [1 1 E W], are V and W. `compound_prompts_text.i`, [Q W], is q_(i+2). The buffer `tokenized_prompts_pos`
    shows whether prompts end with a full stop. If it is missing, they do, as in the public code. All other buffers
    repeat the text tower. Projections that the public code never uses are ignored.

    The files do not name their encoder. The published checkpoints were trained with ViT-L-14-336, openai, at 518 px.

    Raises
    ------
    InputError
        The file is missing, damaged, or of another layout.
    """
    try:
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(path, "is not a torch file of plain tensors, or is cut short") from error
    layers = state.get(APRIL_GAN_KEY, state) if isinstance(state, dict) else None
    if isinstance(layers, dict) and "fc.0.weight" in layers:
        return _read_linear_layers(path, layers, blocks)
    learner = state.get(OFFICIAL_KEY, state) if isinstance(state, dict) else None
    if not isinstance(learner, dict) or not {"ctx_pos", "ctx_neg"} <= learner.keys():
        rule = (
            "is neither a prompt learner of AnomalyCLIP nor linear layers of APRIL-GAN: ctx_pos and ctx_neg are missing"
        )
        raise InputError(path, f"{rule}, and fc.0.weight is")
    deep = _read_deep_tokens(path, learner)
    normal, anomalous = (_read_context(path, learner, name) for name in ("ctx_pos", "ctx_neg"))
    if normal.shape != anomalous.shape or (deep is not None and deep.shape[2] != normal.shape[1]):
        raise InputError(path, "its prompts and deep tokens have different lengths or widths")
    tokens = learner.get("tokenized_prompts_pos")
    try:
        system = AnomalyClip(
            context_tokens=len(normal),
            deep_tokens=0 if deep is None else deep.shape[1],
            depth=1 if deep is None else 1 + len(deep),
            full_stop=tokens is None or bool((tokens == FULL_STOP).any()),
        )
    except ValidationError as error:
        raise InputError(path, f"its prompts match no valid settings: {error.errors()[0]['msg']}") from error
    weights = {"normal": normal, "anomalous": anomalous} | ({} if deep is None else {"deep": deep})
    return Checkpoint(CheckpointMetadata(system=system, encoder=None, paths=None), weights)


def _read_linear_layers(path: Path, layers: Mapping[str, Any], blocks: Sequence[int]) -> Checkpoint:
    count = sum(f"fc.{number}.weight" in layers for number in range(len(layers)))
    if count != len(blocks):
        raise InputError(path, f"has linear layers for {count} blocks, the settings name {len(blocks)}")
    weights: Weights = {}
    for number, block in enumerate(blocks):
        weight, bias = (layers.get(f"fc.{number}.{kind}") for kind in ("weight", "bias"))
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 2:
            raise InputError(path, f"fc.{number} has no weight of shape [dimension width] with a bias")
        if bias.shape != weight.shape[:1] or weight.shape != layers["fc.0.weight"].shape:
            raise InputError(path, f"fc.{number} has a weight or bias of another shape than fc.0")
        weights[f"block-{block}.weight"] = weight.detach().float().contiguous()
        weights[f"block-{block}.bias"] = bias.detach().float().contiguous()
    metadata = CheckpointMetadata(system=AprilGan(blocks=tuple(blocks)), encoder=None, paths=None)
    return Checkpoint(metadata, weights)


def with_trained_values(settings: AnomalyClip, path: Path | None) -> AnomalyClip:
    """Return the settings with the values of their checkpoint, where the configuration leaves them out.

    These are the settings that a training fixes, such as the full stop and the number of learned tokens. A value that
    the configuration states is kept, and `trained_weights` refuses it if the checkpoint has another.

    Raises
    ------
    InputError
        The checkpoint is damaged.
    """
    trained = None if path is None else read_checkpoint(path).metadata.system
    if not isinstance(trained, AnomalyClip):
        return settings
    left_out = set(settings.fixed_by_training) - settings.model_fields_set
    return settings.model_copy(update={name: getattr(trained, name) for name in left_out})


def _read_context(path: Path, learner: Mapping[str, Any], name: str) -> Tensor:
    value = learner[name]
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[:2] != (1, 1):
        raise InputError(path, f"{name} is not of shape [1 1 words width], one normal or one anomalous prompt")
    return value[0, 0].detach().float().contiguous()


def _read_deep_tokens(path: Path, learner: Mapping[str, Any]) -> Tensor | None:
    parts: list[Tensor] = []
    while (name := f"compound_prompts_text.{len(parts)}") in learner:
        value = learner[name]
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape != (parts or [value])[0].shape:
            raise InputError(path, f"{name} is not of shape [tokens width], equal in all layers")
        parts.append(value.detach().float())
    return torch.stack(parts) if parts and parts[0].numel() else None


def trained_weights(
    category_features: CategoryFeatures, settings: AprilGan | AnomalyClip, shapes: Mapping[str, tuple[int, ...]]
) -> Weights:
    """Read the trained weights and check that they fit the system, its settings and the encoder.

    Parameters
    ----------
    shapes
        Expected shape of each tensor, by name.

    Returns
    -------
    The weights on the device.

    Raises
    ------
    ConfigError
        The checkpoint is missing.
    InputError
        The checkpoint is damaged, belongs to another system, other settings or another encoder, or has other tensors.
    """
    path = category_features.checkpoint
    if path is None:
        raise ConfigError(f"{settings.title} must be trained first: it has no checkpoint")
    found = read_checkpoint(path, settings.blocks if isinstance(settings, AprilGan) else VIT_L_BLOCKS)
    trained_with = found.metadata
    if trained_with.system.system != settings.system:
        raise InputError(path, f"was trained for {trained_with.system.title}, not for {settings.title}")
    for name in settings.fixed_by_training:
        trained, wanted = getattr(trained_with.system, name), getattr(settings, name)
        if trained != wanted:
            raise InputError(path, f"was trained with {name} {_as_text(trained)}, the settings say {_as_text(wanted)}")
    if trained_with.encoder is not None and trained_with.encoder != category_features.store.index.identity:
        raise InputError(path, f"was trained with another encoder, not with {category_features.store.index.model}")
    if trained_with.paths is not None:
        current = attention_settings_of(category_features.encoder)
        if differing := [name for name in _ATTENTION_SETTINGS if trained_with.paths.get(name) != current[name]]:
            name = differing[0]
            before, now = _as_text(trained_with.paths.get(name)), _as_text(current[name])
            raise InputError(path, f"was trained with an encoder with {name} {before}, the settings say {now}")
    shapes_found = {name: tuple(value.shape) for name, value in found.weights.items()}
    if shapes_found != dict(shapes):
        wrong = min(name for name in {*shapes_found, *shapes} if shapes_found.get(name) != shapes.get(name))
        raise InputError(
            path, f"tensor {wrong} has shape {shapes_found.get(wrong, 'none')}, expected {shapes.get(wrong, 'none')}"
        )
    if not all(bool(torch.isfinite(value).all()) for value in found.weights.values()):
        raise InputError(path, "some of its weights are NaN or infinite")
    return {name: value.to(category_features.device, torch.float32) for name, value in found.weights.items()}


def _as_text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
