"""Towers of a CLIP of open_clip: images on two attention paths, and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from medad.base.errors import ConfigError
from medad.base.storage import file_digest
from zsad.clip.activation import activation
from zsad.clip.architecture import clip_architecture
from zsad.clip.attention_paths import AttentionPath, patch_path, tower_outputs, unsupported_reason
from zsad.clip.models import describe_encoder
from zsad.clip.tower import ImageTower, Loaded
from zsad.clip.weights import load_into, read_weights
from zsad.clip.weights_place import weights_file
from zsad.clip.windows import encode_windows
from zsad.config.encoder_outputs import EncoderOutput
from zsad.config.run import EncoderSettings

_PROMPTS_PER_BATCH = 64


@dataclass(frozen=True, eq=False)
class ClipTower(ImageTower):
    """A CLIP whose image tower runs on two attention paths. See `zsad.clip.tower.ImageTower`."""

    model: torch.nn.Module
    """CLIP or CustomTextCLIP of open_clip."""
    tokenizer: Any
    attention_path: AttentionPath

    @property
    def module(self) -> Any:
        """The image tower."""
        return self.model.visual

    @property
    def size_px(self) -> int:
        """Side of the square input images."""
        return int(self.module.image_size[0])

    @property
    def grid(self) -> int:
        """Number of patches per side."""
        return int(self.module.grid_size[0])

    @property
    def dim(self) -> int:
        """Dimension D of the joint space."""
        return int(self.module.output_dim)

    @property
    def width(self) -> int:
        """Dimension W of the image tower's tokens."""
        return int(self.module.ln_post.weight.shape[0])

    @property
    def depth(self) -> int:
        """Number of blocks of the image tower."""
        return len(self.module.transformer.resblocks)

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a prompt, including start and end."""
        return int(self.model.context_length)  # type: ignore[arg-type]

    def check(self, output: EncoderOutput, model: str) -> None:
        """Raise ConfigError if the tower lacks an output."""
        output.check(self.depth, self.grid, model)

    def outputs(
        self, images: Float[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> tuple[Float[Tensor, "B D"], dict[str, Float[Tensor, "B _ _"]]]:
        """Return class tokens and the wanted outputs by name, from one forward pass. Windows need further passes."""
        kinds, last = {output.kind for output in wanted}, self.depth - 1
        found = tower_outputs(
            self.module,
            images,
            self.attention_path,
            patches="patches" in kinds,
            plain_patches=not kinds.isdisjoint({"plain", "tokens"}),
            blocks=[
                last if output.kind == "raw" else output.number - 1
                for output in wanted
                if output.kind in {"block", "raw"}
            ],
            vv_blocks=[output.number - 1 for output in wanted if output.kind == "vv"],
        )
        sides = [output.number for output in wanted if output.kind == "window"]
        windows = dict(zip(sides, encode_windows(self.module, images, sides), strict=True)) if sides else {}
        values: dict[str, Tensor] = {}
        for output in wanted:
            if output.kind == "block":
                values[output.name] = found.blocks[output.number - 1]
            elif output.kind == "raw":
                values[output.name] = found.blocks[last][:, 1:]
            elif output.kind == "vv":
                values[output.name] = found.vv_patches[output.number - 1]
            elif output.kind == "window":
                values[output.name] = windows[output.number]
            elif output.kind == "patches":
                assert found.patches is not None
                values[output.name] = found.patches
            elif output.kind == "plain":
                assert found.plain_patches is not None
                values[output.name] = found.plain_patches
            else:
                assert found.last_tokens is not None
                values[output.name] = found.last_tokens
        return found.class_token, values

    def patches(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        """Return only the patches of the V-V path. What only the class token needs is not computed."""
        return patch_path(self.module, images, self.attention_path)

    def encode_text(self, prompts: Sequence[str], *, unit_length: bool = True) -> Float32[Tensor, "n D"]:
        """Return the text features of prompts, L2-normalised if `unit_length`.

        Raises
        ------
        ConfigError
            A prompt has too many tokens. open_clip would cut it off without an error.
        """
        tokens = self.tokenizer(list(prompts))
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            # one token more, because a prompt that fits exactly looks like one that was cut off
            uncut = self.tokenizer(list(prompts), context_length=self.context_length + 1)
            if (long := uncut[:, -1] != 0).any():
                prompt = prompts[int(long.nonzero()[0])]
                raise ConfigError(
                    f"the prompt {prompt!r} is longer than the model's limit of {self.context_length} tokens; "
                    "set a shorter name for its category in prompts.names"
                )
        device = next(self.model.parameters()).device
        batches = tokens.to(device).split(_PROMPTS_PER_BATCH)
        encode: Callable[..., Tensor] = self.model.encode_text  # type: ignore[assignment]
        return torch.cat([encode(batch, normalize=unit_length) for batch in batches])


def load_clip(settings: EncoderSettings) -> Loaded:
    """Build a CLIP on the CPU and load its weights.

    The network is only used for a tag that this machine does not have. The few tags with a tokenizer other than CLIP's
    may also download that.

    Raises
    ------
    ConfigError
        The model or tag is unknown, or the tag is neither cached nor downloadable. Or the settings do not fit the
        model: second path, blocks or image size.
    InputError
        A local file or folder is missing, damaged or of another architecture.
    """
    name, config, statistics = clip_architecture(settings)
    weights, digest = None, f"seed:{settings.seed}"
    if settings.seed is None:
        path = weights_file(settings, name)
        weights = read_weights(path)
        digest = f"sha256:{file_digest(path)}"
    config["quick_gelu"], notes = activation(settings, name, config, weights)
    model = _build(config, settings)
    if reason := unsupported_reason(model.visual):
        raise ConfigError(f"encoder.model {settings.model} cannot have V-V patches: {reason}")
    positions = "bicubic_antialias" if settings.positions == "auto" else settings.positions
    if weights is not None:
        resize = positions if settings.size_px is not None else None
        load_into(model, weights, name=describe_encoder(settings), resize=resize)
    model.eval().requires_grad_(False)
    tower = ClipTower(
        model=model,
        tokenizer=_tokenizer(settings, name, config),
        attention_path=_attention_path(settings, len(model.visual.transformer.resblocks)),
    )
    architecture = config | ({"positions": positions} if settings.size_px is not None else {})
    return Loaded(tower, architecture, digest, tuple(statistics["mean"]), tuple(statistics["std"]), notes)


def _build(config: Mapping[str, Any], settings: EncoderSettings) -> Any:
    """Build an open_clip model with random weights from the seed, if set. The global generator is not changed."""
    arguments = deepcopy(dict(config))
    model_class = open_clip.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed or 0)
        try:
            return model_class(**arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"encoder.model {settings.model}: open_clip cannot build it ({reason})") from error


def _tokenizer(settings: EncoderSettings, name: str, config: Mapping[str, Any]) -> Any:
    """Return the model's tokenizer. It is downloaded only if a tag is set and it is not in the cache."""
    arguments: dict[str, Any] = {}
    if config["text_cfg"].get("hf_tokenizer_name"):
        arguments["local_files_only"] = settings.tag is None
    try:
        return open_clip.get_tokenizer(name, **arguments)
    except Exception as error:  # the loaders of transformers raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"encoder.model {settings.model}: its tokenizer cannot be loaded ({reason})") from error


def _attention_path(settings: EncoderSettings, depth: int) -> AttentionPath:
    """Return the second path's settings, with block numbers for a model with `depth` blocks. Raises ConfigError."""
    wanted = settings.vv_blocks
    blocks = tuple(range(depth)) if wanted == "all" else wanted
    if isinstance(blocks, int):
        blocks = tuple(range(depth - blocks, depth))
    if not blocks or blocks[0] < 0 or blocks[-1] >= depth:
        raise ConfigError(f"encoder.vv_blocks {wanted}: {settings.model} has {depth} blocks, 0 to {depth - 1}")
    try:
        return AttentionPath(
            blocks, settings.vv_feed_forward, settings.vv_temperature, settings.class_ln_post, settings.vv_attention
        )
    except ValueError as error:
        raise ConfigError(f"encoder.vv_blocks: {error}") from error
