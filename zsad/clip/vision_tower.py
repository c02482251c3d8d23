"""Image towers without text: DINOv2 and DINO, built by timm, with weights from a local file. timm downloads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor

from medad.base.errors import InputError
from medad.base.storage import file_digest
from zsad.clip.architecture import vision_size_px
from zsad.clip.models import describe_encoder, weights_files
from zsad.clip.positions import resize_positions, square_side
from zsad.clip.tower import ImageTower, Loaded
from zsad.clip.vision_names import to_timm
from zsad.clip.weights import Weights, difference, read_weights
from zsad.config.encoder_outputs import EncoderOutput, check_vision_output
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import IMAGENET_MEAN, IMAGENET_STD, POSITION_OFFSET, VisionModel, vision_model

_POSITIONS = "pos_embed"


@dataclass(frozen=True, eq=False)
class VisionTower(ImageTower):
    """A vision transformer of timm. See `zsad.clip.tower.ImageTower`.

    The class token is read after the last norm. Patches are those after `patch_block`, without the last norm, because
    earlier blocks separate parts of an object better than the last one.
    """

    model: Any
    """Vision transformer of timm without a head."""
    patch_block: int
    """Block, counted from 1, whose patches are the output `patches`."""

    @property
    def module(self) -> Any:
        """The image tower."""
        return self.model

    @property
    def size_px(self) -> int:
        """Side of the square input images."""
        return int(self.model.patch_embed.img_size[0])

    @property
    def grid(self) -> int:
        """Number of patches per side."""
        return int(self.model.patch_embed.grid_size[0])

    @property
    def dim(self) -> int:
        """Dimension of class tokens and patches, which is the width, because a joint space is missing."""
        return self.width

    @property
    def width(self) -> int:
        """Dimension W of the tokens."""
        return int(self.model.embed_dim)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    def check(self, output: EncoderOutput, model: str) -> None:
        """Raise ConfigError if the tower lacks an output."""
        check_vision_output(output, self.depth, model)

    def outputs(
        self, images: Float[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> tuple[Float[Tensor, "B D"], dict[str, Float[Tensor, "B _ _"]]]:
        """Return class tokens and the wanted outputs by name, from one forward pass."""
        numbers = self._numbers(wanted)
        last, found = self.model.forward_intermediates(
            images,
            indices=[number - 1 for number in numbers] or [self.depth - 1],
            return_prefix_tokens=True,
            output_fmt="NLC",
        )
        values = self._of_blocks(wanted, dict(zip(numbers, found, strict=False)))
        values |= {one.name: last[:, self.model.num_prefix_tokens :] for one in wanted if one.kind == "tokens"}
        return last[:, 0], values

    def outputs_alone(
        self, images: Float[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> dict[str, Float[Tensor, "B _ _"]]:
        """Return the wanted outputs by name, without class tokens. Blocks after the last wanted one are not run."""
        numbers = self._numbers(wanted)
        if not numbers or any(output.kind == "tokens" for output in wanted):
            return self.outputs(images, wanted)[1]
        found = self.model.forward_intermediates(
            images,
            indices=[number - 1 for number in numbers],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )
        return self._of_blocks(wanted, dict(zip(numbers, found, strict=True)))

    def _block_of(self, output: EncoderOutput) -> int:
        return self.patch_block if output.kind == "patches" else output.number

    def _numbers(self, wanted: Sequence[EncoderOutput]) -> list[int]:
        """Return the numbers of the blocks, counted from 1, of all outputs that are not `tokens`."""
        return sorted({self._block_of(output) for output in wanted if output.kind != "tokens"})

    def _of_blocks(
        self, wanted: Sequence[EncoderOutput], after: Mapping[int, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the outputs of blocks by name, from the patches and the first tokens after each block."""
        values = {}
        for output in wanted:
            if output.kind != "tokens":
                patches, prefix = after[self._block_of(output)]
                whole = output.kind == "block"
                values[output.name] = torch.cat([prefix[:, :1], patches], dim=1) if whole else patches
        return values


def load_vision(settings: EncoderSettings) -> Loaded:
    """Build a vision-only encoder on the CPU and load its weights.

    Raises
    ------
    ConfigError
        The settings do not fit the model, or its weights are not on this machine.
    InputError
        The file of the weights is missing, damaged or of another model.
    """
    vision = vision_model(settings.model)
    assert vision is not None
    size_px = vision_size_px(settings, vision)
    patch_block = vision.patch_block(settings.patch_block)
    files = weights_files(settings)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed or 0)
        model = timm.create_model(vision.architecture, pretrained=False, num_classes=0, img_size=size_px)
    digest = f"seed:{settings.seed}"
    if files:
        weights = read_weights(files["weights"])
        digest = f"sha256:{file_digest(files['weights'])}"
        state = vision_state(weights, vision, size_px, settings.positions)
        if found := difference(state, model.state_dict()):
            raise InputError(
                weights.path, f"weights of another architecture than {describe_encoder(settings)}: {found}"
            )
        model.load_state_dict(state)
    model.eval().requires_grad_(False)
    architecture = {"name": vision.name, "image_size": size_px, "positions": settings.positions, "patches": patch_block}
    return Loaded(VisionTower(model, patch_block), architecture, digest, IMAGENET_MEAN, IMAGENET_STD)


def vision_state(weights: Weights, vision: VisionModel, size_px: int, interpolation: str) -> Mapping[str, Tensor]:
    """Return a model's tensors by timm's names, with position embeddings for images of `size_px`.

    With `interpolation` `auto`, positions are interpolated as in Meta's programs. DINO and DINOv2: bicubic, with
    `POSITION_OFFSET` added to the number of patches, and not antialiased. DINOv2 with registers: bicubic and
    antialiased, without the offset.

    Raises
    ------
    InputError
        The tensors are not those of such a model.
    """
    state = to_timm(weights.tensors)
    if state is None:
        raise InputError(weights.path, f"weights of another architecture than {vision.name}: {weights.content()}")
    positions = state[_POSITIONS]
    prefix = 0 if "reg_token" in state else 1
    if positions.ndim != 3 or square_side(positions.shape[1] - prefix) is None:
        shape = " x ".join(map(str, positions.shape))
        raise InputError(weights.path, f"{_POSITIONS} is {shape}, not of a square of patches")
    side = size_px // vision.patch_px
    own = interpolation == "auto"
    patches = resize_positions(
        positions[0, prefix:],
        side,
        ("bicubic_antialias" if vision.registers else "bicubic") if own else interpolation,  # type: ignore[arg-type]
        offset=POSITION_OFFSET if own and not vision.registers else 0.0,
    )
    return state | {_POSITIONS: torch.cat([positions[0, :prefix], patches])[None]}
