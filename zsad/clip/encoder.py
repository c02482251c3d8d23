"""Frozen encoder of images, and of prompts if it has a text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from medad.base.errors import ConfigError
from zsad.clip.architecture import check_outputs, depth_of, size_of
from zsad.clip.attention_paths import AttentionPath
from zsad.clip.clip_tower import ClipTower, load_clip
from zsad.clip.models import describe_encoder
from zsad.clip.precision import DTYPES, Precision, capability_of, effective_precision
from zsad.clip.prompts import Ensemble
from zsad.clip.tower import ImageTower
from zsad.clip.vision_tower import load_vision
from zsad.config.encoder_outputs import PATCHES, EncoderOutput
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import TEXT_FREE, vision_model

__all__ = ["Encoder", "Tokens", "check_outputs", "depth_of", "size_of"]

_NORMALISED = frozenset({"patches", "plain", "vv", "window"})
"""Kinds of outputs that are L2-normalised."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch of images, L2-normalised, in the joint space of images and text if there is one."""

    class_token: Float[Tensor, "B D"]
    """Class tokens of the original path."""
    patches: Float[Tensor, "B N D"]
    """Patch tokens, row by row: of the V-V path, or after the block `encoder.patch_block` of a model without text."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """Frozen model in evaluation mode and without gradients. `Encoder.load` makes it."""

    tower: ImageTower
    """Towers of a CLIP, or the image tower of a model without text."""
    mean: Float32[Tensor, "3 1 1"]
    std: Float32[Tensor, "3 1 1"]
    device: torch.device
    precision: Precision
    """Number format of the image tower. The text tower has 32 bits."""
    random_weights: bool
    """Whether the weights are random. Then scores have no meaning, and every output must say so."""
    description: str
    identity: Mapping[str, Any]
    """Architecture with its image size, digest of the weights file, mean and standard deviation, as JSON values."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the weights."""

    @classmethod
    def load(cls, settings: EncoderSettings, device: torch.device) -> Encoder:
        """Build a model and load its weights.

        The network is only used for a tag of open_clip that this machine does not have.

        Raises
        ------
        ConfigError
            The model or tag is unknown, its weights are not on this machine and cannot be downloaded, or the settings
            do not fit the model: second path, blocks or image size.
        InputError
            A local file or folder is missing, damaged or of another architecture.
        """
        loaded = (load_clip if vision_model(settings.model) is None else load_vision)(settings)
        precision = effective_precision(settings.precision, capability_of(device))
        tower = loaded.tower
        (tower.model if isinstance(tower, ClipTower) else tower.module).to(device)
        tower.module.to(DTYPES[precision])
        return cls(
            tower=tower,
            mean=_channels(loaded.mean, device),
            std=_channels(loaded.std, device),
            device=device,
            precision=precision,
            random_weights=settings.seed is not None,
            description=describe_encoder(settings),
            identity={
                "architecture": loaded.architecture,
                "weights": loaded.weights,
                "mean": loaded.mean,
                "std": loaded.std,
                "precision": precision,
            },
            notes=loaded.notes,
        )

    @property
    def has_text(self) -> bool:
        """Whether the model has a text tower."""
        return isinstance(self.tower, ClipTower)

    @property
    def size_px(self) -> int:
        """Side of the square input images."""
        return self.tower.size_px

    @property
    def grid(self) -> int:
        """Number of patches per side. N is its square."""
        return self.tower.grid

    @property
    def dim(self) -> int:
        """Dimension D of class tokens and patches."""
        return self.tower.dim

    @property
    def depth(self) -> int:
        """Number of blocks of the image tower."""
        return self.tower.depth

    @property
    def clip(self) -> ClipTower:
        """The towers of a CLIP. Raises ConfigError if the model has no text tower."""
        if not isinstance(self.tower, ClipTower):
            raise ConfigError(f"{self.description} has no text tower for prompts; methods without text: {TEXT_FREE}")
        return self.tower

    @property
    def model(self) -> torch.nn.Module:
        """CLIP or CustomTextCLIP of open_clip. Raises ConfigError if the model has no text tower."""
        return self.clip.model

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of prompts. Raises ConfigError if the model has no text tower."""
        return self.clip.tokenizer

    @property
    def attention_path(self) -> AttentionPath:
        """Second attention path. Raises ConfigError if the model has no text tower, and so no second path."""
        return self.clip.attention_path

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a prompt, including start and end. Raises ConfigError without a text tower."""
        return self.clip.context_length

    def normalise(self, images: Float32[Tensor, "B 3 S S"]) -> Float32[Tensor, "B 3 S S"]:
        """Move images with values 0..1 to the model's device and apply its mean and standard deviation."""
        return (images.to(self.device) - self.mean) / self.std

    @torch.no_grad()
    def encode(self, images: Float32[Tensor, "B 3 S S"]) -> Tokens:
        """Return class tokens and patches of images with values 0..1 and side S = `size_px`."""
        class_token, values = self.encode_outputs(images, (EncoderOutput.parse(PATCHES),))
        return Tokens(class_token, values[PATCHES])

    def output_shape(self, output: EncoderOutput) -> tuple[int, int]:
        """Return the shape of an encoder output for one crop. Raises ConfigError if the model lacks this output."""
        self.tower.check(output, self.description)
        if output.kind == "block":
            return 1 + self.grid**2, self.tower.width
        if output.kind in {"tokens", "raw"}:
            return self.grid**2, self.tower.width
        if output.kind == "window":
            return (self.grid - output.number + 1) ** 2, self.dim
        return self.grid**2, self.dim

    @torch.no_grad()
    def encode_outputs(
        self, images: Float32[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> tuple[Float32[Tensor, "B D"], dict[str, Float32[Tensor, "B _ _"]]]:
        """Return the class tokens, L2-normalised, and the wanted encoder outputs by name.

        One forward pass computes all outputs except windows, which need further passes. Nothing else is computed.
        Outputs in the joint space and `patches` are L2-normalised. The model must have all wanted outputs, see
        `output_shape`. Results have 32 bits in every precision.

        Raises
        ------
        ConfigError
            Values became too large for fp16.
        """
        class_token, found = self.tower.outputs(self._prepared(images), wanted)
        self._refuse_overflow(class_token)
        return functional.normalize(class_token.float(), dim=-1), _stored_form(found, wanted)

    @torch.no_grad()
    def encode_outputs_alone(
        self, images: Float32[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> dict[str, Float32[Tensor, "B _ _"]]:
        """Return the outputs of `encode_outputs` without class tokens. DINOv2 and DINO run fewer blocks for it.

        Raises ConfigError as `encode_outputs`.
        """
        found = self.tower.outputs_alone(self._prepared(images), wanted)
        for values in found.values():
            self._refuse_overflow(values)
        return _stored_form(found, wanted)

    @torch.no_grad()
    def encode_patches(self, images: Float32[Tensor, "B 3 S S"]) -> Float32[Tensor, "B N D"]:
        """Return only the patches of `encode`. What only the class token needs is not computed."""
        patches = self.tower.patches(self._prepared(images))
        self._refuse_overflow(patches)
        return functional.normalize(patches.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], *, unit_length: bool = True) -> Float32[Tensor, "n D"]:
        """Return the text features of prompts, L2-normalised if `unit_length`.

        Raises
        ------
        ConfigError
            The model has no text tower, or a prompt has too many tokens. open_clip would cut it off without an error.
        """
        return self.clip.encode_text(prompts, unit_length=unit_length)

    def encode_ensemble(self, ensemble: Ensemble) -> Float32[Tensor, "2 D"]:
        """Return the mean text features of the normal and of the anomalous prompts, L2-normalised again.

        Raises ConfigError as `encode_text`.
        """
        prompts, unit = (ensemble.normal, ensemble.anomalous), ensemble.unit_length
        sides = [self.encode_text(side, unit_length=unit).mean(dim=0) for side in prompts]
        return functional.normalize(torch.stack(sides), dim=-1)

    def _prepared(self, images: Tensor) -> Tensor:
        return self.normalise(images).to(DTYPES[self.precision])

    def _refuse_overflow(self, values: Tensor) -> None:
        if self.precision == "fp16" and not torch.isfinite(values).all():
            raise ConfigError(
                f"encoder.precision fp16: values of {self.description} are too large for it; set bf16 or fp32"
            )


def _stored_form(found: Mapping[str, Tensor], wanted: Sequence[EncoderOutput]) -> dict[str, Tensor]:
    """Return outputs with 32 bits, those of some kinds L2-normalised."""
    values = {output.name: found[output.name].float() for output in wanted}
    normalised = {output.name for output in wanted if output.kind in _NORMALISED}
    return {name: functional.normalize(one, dim=-1) if name in normalised else one for name, one in values.items()}


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=device).reshape(3, 1, 1)
