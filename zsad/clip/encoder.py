"""A frozen CLIP of open_clip's: images to class and V-V patch tokens, prompts to text features."""

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
    """What an image becomes, L2-normalised, in the space it shares with text."""

    class_token: Float[Tensor, "B D"]
    """From the original path."""
    patches: Float[Tensor, "B N D"]
    """From the V-V path, row by row."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model with its two paths, in evaluation mode, without gradients. Made by `Encoder.load`."""

    model: torch.nn.Module
    """open_clip's CLIP or CustomTextCLIP, as its constructor left it."""
    tokenizer: Any
    attention_path: AttentionPath
    mean: Float32[Tensor, "3 1 1"]
    std: Float32[Tensor, "3 1 1"]
    device: torch.device
    random_weights: bool
    """The weights are random: outputs mean nothing and must say so."""
    description: str
    identity: Mapping[str, Any]
    """Architecture with its image size, digest of the weights file, and the normalisation; for JSON."""

    @classmethod
    def load(cls, settings: EncoderSettings, device: torch.device) -> Encoder:
        """Build a model and fill in its weights.

        The network is used for nothing but a tag that is not in the local cache (and for the tokenizer of the few
        tags that have another than CLIP's). The activation is the model's own, unless the weights need OpenAI's quick
        GELU, which the tag, or a file in OpenAI's own format, says. A state dict of OpenAI's weights that someone saved
        again does not say so: name a `-quickgelu` model for it.

        Raises
        ------
        ConfigError
            Unknown model or tag, a model that cannot have the second path, blocks or an image size that do not fit it,
            a tag that is neither cached nor downloadable.
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
        """Side of the square images it takes."""
        return int(self.model.visual.image_size[0])  # type: ignore[index, union-attr]

    @property
    def grid(self) -> int:
        """Patches a side; N = grid squared."""
        return int(self.model.visual.grid_size[0])  # type: ignore[index, union-attr]

    @property
    def dim(self) -> int:
        """Dimension D of the joint space."""
        return int(self.model.visual.output_dim)  # type: ignore[union-attr, arg-type]

    @property
    def context_length(self) -> int:
        """Tokens that a prompt may have, start and end included."""
        return int(self.model.context_length)  # type: ignore[arg-type]

    def normalise(self, images: Float32[Tensor, "B 3 S S"]) -> Float32[Tensor, "B 3 S S"]:
        """Values 0..1 to what the model was trained on, on its device."""
        return (images.to(self.device) - self.mean) / self.std

    @torch.no_grad()
    def encode(self, images: Float32[Tensor, "B 3 S S"]) -> Tokens:
        """Class token and patches by one forward; values 0..1, S = `size_px`."""
        class_token, patches = two_path(self.model.visual, self.normalise(images), self.attention_path)
        return Tokens(functional.normalize(class_token, dim=-1), functional.normalize(patches, dim=-1))

    @property
    def depth(self) -> int:
        """Blocks of the image tower."""
        return len(self.model.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]

    def output_shape(self, output: EncoderOutput) -> tuple[int, int]:
        """Shape of a row of an output. Raises ConfigError where the model has no such output."""
        output.check(self.depth, self.grid, self.description)
        width = int(self.model.visual.ln_post.weight.shape[0])  # type: ignore[union-attr, index]
        if output.kind == "block":
            return 1 + self.grid**2, width
        if output.kind == "tokens":
            return self.grid**2, width
        if output.kind == "window":
            return (self.grid - output.number + 1) ** 2, self.dim
        return self.grid**2, self.dim

    @torch.no_grad()
    def encode_outputs(
        self, images: Float32[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> tuple[Float[Tensor, "B D"], dict[str, Float[Tensor, "B _ _"]]]:
        """Return the class token and the wanted outputs by name, from one forward pass (windows need more).

        Nothing else is computed. All must be there, as `output_shape` tells; what is of dimension D is L2-normalised.
        """
        normalised, visual = self.normalise(images), self.model.visual
        blocks = [output.number - 1 for output in wanted if output.kind == "block"]
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
        """The patches of `encode`, without what only the class token needs."""
        return functional.normalize(patch_path(self.model.visual, self.normalise(images), self.attention_path), dim=-1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Float32[Tensor, "n D"]:
        """Text features, L2-normalised.

        Raises
        ------
        ConfigError
            A prompt is longer than the model reads; open_clip would cut it off.
        """
        tokens = self.tokenizer(list(prompts))
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            # asked for one token more, since a prompt that fits exactly looks like one that was cut off
            uncut = self.tokenizer(list(prompts), context_length=self.context_length + 1)
            if (long := uncut[:, -1] != 0).any():
                prompt = prompts[int(long.nonzero()[0])]
                raise ConfigError(
                    f"the prompt {prompt!r} is longer than the {self.context_length} tokens that the model reads; "
                    "give its category a shorter name by prompts.names"
                )
        batches = tokens.to(self.device).split(_PROMPTS_PER_BATCH)
        return torch.cat([self.model.encode_text(batch, normalize=True) for batch in batches])  # type: ignore[operator]

    def encode_ensemble(self, ensemble: Ensemble) -> Float32[Tensor, "2 D"]:
        """Normal and anomalous: the mean of either side's features, L2-normalised again."""
        sides = [self.encode_text(side).mean(dim=0) for side in (ensemble.normal, ensemble.anomalous)]
        return functional.normalize(torch.stack(sides), dim=-1)


def check_outputs(settings: EncoderSettings, names: Sequence[str]) -> None:
    """Raise ConfigError if an encoder lacks one of these outputs. Builds and loads nothing."""
    _, config, _ = _architecture(settings)
    vision = config["vision_cfg"]
    grid = int(vision["image_size"]) // int(vision.get("patch_size", 16))
    for output in parse_outputs(names):
        output.check(int(vision["layers"]), grid, describe_encoder(settings))


def depth_of(settings: EncoderSettings) -> int:
    """Return the number of blocks of an encoder's image tower; nothing is built or loaded. Raises ConfigError."""
    return int(_architecture(settings)[1]["vision_cfg"]["layers"])


def _architecture(settings: EncoderSettings) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """open_clip's name of a model, its configuration at the size wanted, and mean and standard deviation of images."""
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
            raise ConfigError(f"encoder.model {settings.model}: open_clip has no such model; near: {near}")
        config = open_clip.get_model_config(name)
        if settings.tag is not None:
            tag = open_clip.get_pretrained_cfg(name, settings.tag)
            if not tag:
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
                raise ConfigError(f"encoder.tag {settings.tag}: {name} has no such tag; it has: {tags}")
            statistics |= {key: tag[key] for key in statistics if key in tag}
    vision = config["vision_cfg"]
    # told before anything is built: these towers are large, or would be fetched from the network
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list) or "multimodal_cfg" in config:
        raise ConfigError(f"encoder.model {settings.model} cannot have V-V patches: it is no plain vision transformer")
    if config["text_cfg"].get("hf_model_name"):
        raise ConfigError(f"encoder.model {settings.model}: its text tower lies outside open_clip; not supported")
    if settings.size_px is not None:
        vision["image_size"] = settings.size_px
        patch = vision.get("patch_size", 16)
        if settings.size_px % patch:
            raise ConfigError(f"encoder.size_px {settings.size_px} is no multiple of the model's patches of {patch} px")
    return name, config, statistics


def _folder_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Architecture and preprocessing of a model's folder."""
    path = folder / CONFIG_NAME
    try:
        with reading(path):
            config = json.loads(path.read_text(encoding="utf-8"))
        model = config["model_cfg"]
        if not isinstance(model["vision_cfg"], dict) or not isinstance(model["text_cfg"], dict):
            raise TypeError
        return model, dict(config.get("preprocess_cfg", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, "is no open_clip configuration: expected JSON with model_cfg") from error


def _build(config: Mapping[str, Any], settings: EncoderSettings) -> Any:
    """An open_clip model with random weights, from the seed if there is one; the global generator stays as it was."""
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
    """The local file of the weights; a tag is looked up in the cache first and downloaded only then."""
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
    except Exception as error:  # whatever the network brings
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"encoder.tag {settings.tag} of {name} is not in the local cache and cannot be downloaded ({reason}); "
            "give a local file as encoder.weights"
        ) from error


def _cached_weights(tag: Mapping[str, Any]) -> Path | None:
    """The file of a tag in the local hub cache, found without asking the hub whether there is a newer one."""
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
    """The model's own; one from the hub only if a tag was asked for, or it is in the cache."""
    arguments: dict[str, Any] = {}
    if config["text_cfg"].get("hf_tokenizer_name"):
        arguments["local_files_only"] = settings.tag is None
    try:
        return open_clip.get_tokenizer(name, **arguments)
    except Exception as error:  # transformers is no dependency of ours, and its loaders raise many things
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"encoder.model {settings.model}: its tokenizer cannot be loaded ({reason})") from error


def _attention_path(settings: EncoderSettings, depth: int) -> AttentionPath:
    """The V-V blocks by number, for a model of `depth` blocks."""
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
