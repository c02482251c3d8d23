"""Frozen CLIP model of open_clip. It encodes images to class and patch tokens, and prompts to text features."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float, Float32
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from torch import Tensor
from torch.nn import functional

from medad.base.errors import ConfigError, InputError
from medad.base.storage import file_digest, reading
from zsad.clip.attention_paths import AttentionPath, patch_path, tower_outputs, two_path, unsupported_reason
from zsad.clip.models import CONFIG_NAME, describe_encoder, find_weights, model_folder
from zsad.clip.prompts import Ensemble
from zsad.clip.weights import load_into, read_weights
from zsad.clip.windows import encode_windows
from zsad.config.encoder_outputs import EncoderOutput, parse_outputs
from zsad.config.run import EncoderSettings

_PROMPTS_PER_BATCH = 64


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch of images, L2-normalised, in the joint space of images and text."""

    class_token: Float[Tensor, "B D"]
    """Class tokens of the original path."""
    patches: Float[Tensor, "B N D"]
    """Patch tokens of the V-V path, row by row."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """Model with two attention paths, in evaluation mode and without gradients. `Encoder.load` makes it."""

    model: torch.nn.Module
    """CLIP or CustomTextCLIP of open_clip."""
    tokenizer: Any
    attention_path: AttentionPath
    mean: Float32[Tensor, "3 1 1"]
    std: Float32[Tensor, "3 1 1"]
    device: torch.device
    random_weights: bool
    """Whether the weights are random. Then scores have no meaning, and every output must say so."""
    description: str
    identity: Mapping[str, Any]
    """Architecture with its image size, digest of the weights file, mean and standard deviation, as JSON values."""

    @classmethod
    def load(cls, settings: EncoderSettings, device: torch.device) -> Encoder:
        """Build a model and load its weights.

        The network is only used for a tag that is not in the local cache. The few tags with a tokenizer other than
        CLIP's may also download that.

        The activation is that of the model. OpenAI's quick GELU replaces it if the tag or a file in OpenAI's format
        requires it. A state dict of OpenAI's weights that was saved again does not show this. Name a `-quickgelu` model
        for such a file.

        Raises
        ------
        ConfigError
            The model or tag is unknown, or the tag is neither cached nor downloadable. Or the settings do not fit the
            model: second path, blocks or image size.
        InputError
            A local file or folder is missing, damaged or of another architecture.
        """
        name, config, statistics = _architecture(settings)
        weights = None
        digest = f"seed:{settings.seed}"
        if settings.seed is None:
            path = _weights_path(settings, name)
            weights = read_weights(path)
            digest = f"sha256:{file_digest(path)}"
            quick = weights.openai or bool(open_clip.get_pretrained_cfg(name, settings.tag or "").get("quick_gelu"))
            config["quick_gelu"] = quick or config.get("quick_gelu", False)
        model = _build(config, settings)
        if reason := unsupported_reason(model.visual):
            raise ConfigError(f"encoder.model {settings.model} cannot have V-V patches: {reason}")
        if weights is not None:
            load_into(model, weights, name=describe_encoder(settings), resize=settings.size_px is not None)
        model.eval().requires_grad_(False).to(device)
        return cls(
            model=model,
            tokenizer=_tokenizer(settings, name, config),
            attention_path=_attention_path(settings, len(model.visual.transformer.resblocks)),
            mean=_channels(statistics["mean"], device),
            std=_channels(statistics["std"], device),
            device=device,
            random_weights=settings.seed is not None,
            description=describe_encoder(settings),
            identity={"architecture": config, "weights": digest, "mean": statistics["mean"], "std": statistics["std"]},
        )

    @property
    def size_px(self) -> int:
        """Side of the square input images."""
        return int(self.model.visual.image_size[0])  # type: ignore[index, union-attr]

    @property
    def grid(self) -> int:
        """Number of patches per side. N is its square."""
        return int(self.model.visual.grid_size[0])  # type: ignore[index, union-attr]

    @property
    def dim(self) -> int:
        """Dimension D of the joint space."""
        return int(self.model.visual.output_dim)  # type: ignore[union-attr, arg-type]

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a prompt, including start and end."""
        return int(self.model.context_length)  # type: ignore[arg-type]

    def normalise(self, images: Float32[Tensor, "B 3 S S"]) -> Float32[Tensor, "B 3 S S"]:
        """Move images with values 0..1 to the model's device and apply its mean and standard deviation."""
        return (images.to(self.device) - self.mean) / self.std

    @torch.no_grad()
    def encode(self, images: Float32[Tensor, "B 3 S S"]) -> Tokens:
        """Return class tokens and patches of images with values 0..1 and side S = `size_px`."""
        class_token, patches = two_path(self.model.visual, self.normalise(images), self.attention_path)
        return Tokens(functional.normalize(class_token, dim=-1), functional.normalize(patches, dim=-1))

    @property
    def depth(self) -> int:
        """Number of blocks of the image tower."""
        return len(self.model.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]

    def output_shape(self, output: EncoderOutput) -> tuple[int, int]:
        """Return the shape of an encoder output for one crop. Raises ConfigError if the model lacks this output."""
        output.check(self.depth, self.grid, self.description)
        width = int(self.model.visual.ln_post.weight.shape[0])  # type: ignore[union-attr, index]
        if output.kind == "block":
            return 1 + self.grid**2, width
        if output.kind in {"tokens", "raw"}:
            return self.grid**2, width
        if output.kind == "window":
            return (self.grid - output.number + 1) ** 2, self.dim
        return self.grid**2, self.dim

    @torch.no_grad()
    def encode_outputs(
        self, images: Float32[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> tuple[Float[Tensor, "B D"], dict[str, Float[Tensor, "B _ _"]]]:
        """Return the class tokens and the wanted encoder outputs by name.

        One forward pass computes all outputs except windows, which need further passes. Nothing else is computed.
        Outputs in the joint space are L2-normalised. The model must have all wanted outputs, see `output_shape`.
        """
        normalised, visual = self.normalise(images), self.model.visual
        last = self.depth - 1
        blocks = [output.number - 1 if output.number else last for output in wanted if output.kind in {"block", "raw"}]
        vv_blocks = [output.number - 1 for output in wanted if output.kind == "vv"]
        kinds = {output.kind for output in wanted}
        found = tower_outputs(
            visual,
            normalised,
            self.attention_path,
            patches="patches" in kinds,
            plain_patches=not kinds.isdisjoint({"plain", "tokens"}),
            blocks=blocks,
            vv_blocks=vv_blocks,
        )
        sides = [output.number for output in wanted if output.kind == "window"]
        windows = dict(zip(sides, encode_windows(visual, normalised, sides), strict=True)) if sides else {}
        values: dict[str, Tensor] = {}
        for output in wanted:
            if output.kind == "block":
                values[output.name] = found.blocks[output.number - 1]
            elif output.kind == "raw":
                values[output.name] = found.blocks[last][:, 1:]
            elif output.kind == "vv":
                values[output.name] = functional.normalize(found.vv_patches[output.number - 1], dim=-1)
            elif output.kind == "window":
                values[output.name] = functional.normalize(windows[output.number], dim=-1)
            elif output.kind == "patches":
                assert found.patches is not None
                values[output.name] = functional.normalize(found.patches, dim=-1)
            elif output.kind == "plain":
                assert found.plain_patches is not None
                values[output.name] = functional.normalize(found.plain_patches, dim=-1)
            else:
                assert found.last_tokens is not None
                values[output.name] = found.last_tokens
        return functional.normalize(found.class_token, dim=-1), values

    @torch.no_grad()
    def encode_patches(self, images: Float32[Tensor, "B 3 S S"]) -> Float32[Tensor, "B N D"]:
        """Return only the patches of `encode`. What only the class token needs is not computed."""
        return functional.normalize(patch_path(self.model.visual, self.normalise(images), self.attention_path), dim=-1)

    @torch.no_grad()
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
        batches = tokens.to(self.device).split(_PROMPTS_PER_BATCH)
        return torch.cat([self.model.encode_text(batch, normalize=unit_length) for batch in batches])  # type: ignore[operator]

    def encode_ensemble(self, ensemble: Ensemble) -> Float32[Tensor, "2 D"]:
        """Return the mean text features of the normal and of the anomalous prompts, L2-normalised again."""
        prompts, unit = (ensemble.normal, ensemble.anomalous), ensemble.unit_length
        sides = [self.encode_text(side, unit_length=unit).mean(dim=0) for side in prompts]
        return functional.normalize(torch.stack(sides), dim=-1)


def check_outputs(settings: EncoderSettings, names: Sequence[str]) -> None:
    """Raise ConfigError if an encoder lacks one of these outputs. The model is not built or loaded."""
    _, config, _ = _architecture(settings)
    vision = config["vision_cfg"]
    grid = int(vision["image_size"]) // int(vision.get("patch_size", 16))
    for output in parse_outputs(names):
        output.check(int(vision["layers"]), grid, describe_encoder(settings))


def depth_of(settings: EncoderSettings) -> int:
    """Return the number of blocks of an encoder's image tower, without building it. Raises ConfigError."""
    return int(_architecture(settings)[1]["vision_cfg"]["layers"])


def _architecture(settings: EncoderSettings) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """Return a model's name in open_clip, its configuration at the requested size, and its mean and standard
    deviation."""
    statistics: dict[str, Any] = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    folder = model_folder(settings)
    if folder is not None:
        name = f"local-dir:{folder}"
        config, preprocess = _folder_config(folder)
        statistics |= {key: preprocess[key] for key in statistics if key in preprocess}
    else:
        name = settings.model.replace("/", "-")
        known = open_clip.list_models()
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "ViT-B-16-plus-240, ViT-L-14-336"
            raise ConfigError(f"encoder.model {settings.model}: open_clip has no such model; similar names: {near}")
        config = open_clip.get_model_config(name)
        if settings.tag is not None:
            tag = open_clip.get_pretrained_cfg(name, settings.tag)
            if not tag:
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
                raise ConfigError(f"encoder.tag {settings.tag}: {name} has no such tag; it has: {tags}")
            statistics |= {key: tag[key] for key in statistics if key in tag}
    vision = config["vision_cfg"]
    # checked before the model is built: these towers are large or would be downloaded
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list) or "multimodal_cfg" in config:
        raise ConfigError(
            f"encoder.model {settings.model} cannot have V-V patches: it is not a plain vision transformer"
        )
    if config["text_cfg"].get("hf_model_name"):
        raise ConfigError(f"encoder.model {settings.model}: its text tower is not part of open_clip; not supported")
    if settings.size_px is not None:
        vision["image_size"] = settings.size_px
        patch = vision.get("patch_size", 16)
        if settings.size_px % patch:
            raise ConfigError(
                f"encoder.size_px {settings.size_px} is not a multiple of the model's patch size, {patch} px"
            )
    return name, config, statistics


def _folder_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the architecture and the preprocessing from a model's folder."""
    path = folder / CONFIG_NAME
    try:
        with reading(path):
            config = json.loads(path.read_text(encoding="utf-8"))
        model = config["model_cfg"]
        if not isinstance(model["vision_cfg"], dict) or not isinstance(model["text_cfg"], dict):
            raise TypeError
        return model, dict(config.get("preprocess_cfg", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, "is not an open_clip configuration; expected JSON with model_cfg") from error


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


def _weights_path(settings: EncoderSettings, name: str) -> Path:
    """Return the local file of the weights. A tag is downloaded only if it is not in the cache."""
    folder = model_folder(settings)
    if folder is not None:
        return find_weights(folder)
    if settings.weights is not None:
        return Path(settings.weights).expanduser()
    tag = open_clip.get_pretrained_cfg(name, settings.tag)
    if cached := _cached_weights(tag):
        return cached
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # network errors have many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"encoder.tag {settings.tag} of {name} is not in the local cache and cannot be downloaded ({reason}); "
            "set encoder.weights to a local file"
        ) from error


def _cached_weights(tag: Mapping[str, Any]) -> Path | None:
    """Return the file of a tag in the local hub cache, or None. The hub is not asked for a newer version."""
    if not tag.get("hf_hub"):
        return None
    repository, filename = os.path.split(tag["hf_hub"])
    names = (f"{os.path.splitext(filename)[0]}.safetensors", filename)  # noqa: PTH122
    for candidate in names if filename else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        found = try_to_load_from_cache(repository, candidate)
        if isinstance(found, str):
            return Path(found)
    return None


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


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=device).reshape(3, 1, 1)
