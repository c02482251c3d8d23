"""Make small CLIP models of open_clip for tests, with random parameters from a seed, and images for them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from zsad.config.run import EncoderSettings

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.3},
    "mean of patches": {"pool_type": "avg"},
    "mean before the last norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "no first norm": {"no_ln_pre": True},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "wide feed-forward": {"mlp_ratio": 3.0, "head_width": 16},
    "one block": {"layers": 1},
}
"""Changes of `vision_cfg` by name."""


def tiny_config(*, quick_gelu: bool = False, **vision: Any) -> dict[str, Any]:
    config = deepcopy(TINY) | {"quick_gelu": quick_gelu}
    config["vision_cfg"] |= vision
    return config


def tiny_clip(config: dict[str, Any], seed: int = 0) -> open_clip.CLIP:
    """Return a model with random biases and gains. In a new model of open_clip they are 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = open_clip.CLIP(**deepcopy(config)).eval()
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim < 2 else 0.5 / math.sqrt(parameter.shape[-1])
            parameter.data += scale * torch.randn(parameter.shape)
    return model


def write_folder(folder: Path, model: open_clip.CLIP, config: dict[str, Any], **preprocess: Any) -> Path:
    """Write a model as a folder that open_clip's `local-dir:` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def tiny_encoder(folder: Path, seed: int = 0, **settings: Any) -> EncoderSettings:
    """Write a tiny CLIP if it does not exist yet, and return the settings that load it."""
    if not folder.exists():
        config = tiny_config()
        write_folder(folder, tiny_clip(config, seed), config)
    return EncoderSettings(model=f"local-dir:{folder}", **settings)


def noise_images(folder: Path, sizes_hw: Sequence[tuple[int, int]], seed: int = 0) -> list[Path]:
    """Write noise images 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = [folder / f"{number}.png" for number in range(len(sizes_hw))]
    for path, size in zip(paths, sizes_hw, strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return paths
