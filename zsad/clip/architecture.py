"""Architecture of a model from its settings, without building it: blocks, sizes, mean and standard deviation."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medad.base.errors import ConfigError, InputError
from medad.base.storage import reading
from zsad.clip.models import CONFIG_NAME, describe_encoder, model_folder
from zsad.config.encoder_outputs import check_vision_output, parse_outputs
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import VisionModel, vision_model

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of images in OpenAI's CLIP, which open_clip takes for a model that names no others."""


def check_outputs(settings: EncoderSettings, names: Sequence[str]) -> None:
    """Raise ConfigError if an encoder lacks one of these outputs. The model is not built or loaded."""
    vision = vision_model(settings.model)
    if vision is not None:
        vision.patch_block(settings.patch_block)
        for output in parse_outputs(names):
            check_vision_output(output, vision.depth, describe_encoder(settings))
        return
    _, config, _ = clip_architecture(settings)
    tower = config["vision_cfg"]
    grid = int(tower["image_size"]) // int(tower.get("patch_size", 16))
    for output in parse_outputs(names):
        output.check(int(tower["layers"]), grid, describe_encoder(settings))


def depth_of(settings: EncoderSettings) -> int:
    """Return the number of blocks of an encoder's image tower, without building it. Raises ConfigError."""
    vision = vision_model(settings.model)
    return vision.depth if vision is not None else int(clip_architecture(settings)[1]["vision_cfg"]["layers"])


def size_of(settings: EncoderSettings) -> int:
    """Return the side of an encoder's square input images, px, without building it. Raises ConfigError."""
    vision = vision_model(settings.model)
    if vision is not None:
        return vision_size_px(settings, vision)
    return int(clip_architecture(settings)[1]["vision_cfg"]["image_size"])


def vision_size_px(settings: EncoderSettings, vision: VisionModel) -> int:
    """Return the side of a vision-only encoder's input images, px. Raises ConfigError if patches do not fill it."""
    size_px = settings.size_px or vision.size_px
    if size_px % vision.patch_px:
        lower = size_px - size_px % vision.patch_px
        raise ConfigError(
            f"encoder.size_px {size_px} is not a multiple of the model's patch size, {vision.patch_px} px; "
            f"the nearest are {lower} and {lower + vision.patch_px}"
        )
    return size_px


def clip_architecture(settings: EncoderSettings) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """Return a CLIP's name in open_clip, its configuration at the requested size, and its mean and standard deviation.

    Raises ConfigError for a model or tag that does not exist or cannot be used, and InputError for a folder.
    """
    statistics: dict[str, Any] = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
    folder = model_folder(settings)
    if folder is not None:
        name = f"local-dir:{folder}"
        config, preprocess = _folder_config(folder)
        statistics |= {key: preprocess[key] for key in statistics if key in preprocess}
    else:
        import open_clip  # only here: it takes seconds to load, and a folder has its own configuration

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
