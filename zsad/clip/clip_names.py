"""Rename the tensors of a CLIP to open_clip's names, from those of transformers, and say in words what a file holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_TOWERS = (("text_model", "transformer"), ("vision_model", "visual.transformer"))
_LAYER_PARTS = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
_SINGLE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
"""Names in transformers (`pre_layrnorm` is spelt so there), and in open_clip."""
_PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
"""Projections, which are transposed."""
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.")


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return tensors of transformers' CLIPModel by open_clip's names. None: they have other names, or some are missing.

    Queries, keys and values of a layer become one tensor. The position numbers of older files are left out.
    """
    if not tensors.keys() >= {*_SINGLE, *_PROJECTIONS}:
        return None
    named = {new: tensors[old] for old, new in _SINGLE.items()}
    named |= {new: tensors[old].T.contiguous() for old, new in _PROJECTIONS.items()}
    try:
        for tower, blocks in _TOWERS:
            for number in _layers(tensors, tower):
                old, new = f"{tower}.encoder.layers.{number}", f"{blocks}.resblocks.{number}"
                for kind in ("weight", "bias"):
                    parts = [tensors[f"{old}.self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
                    named[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
                    for ours, theirs in _LAYER_PARTS:
                        named[f"{new}.{theirs}.{kind}"] = tensors[f"{old}.{ours}.{kind}"]
    except KeyError:
        return None
    return named | {name: tensor for name, tensor in tensors.items() if name in {"logit_scale", "logit_bias"}}


def _layers(tensors: Iterable[str], tower: str) -> list[int]:
    found = (_LAYER.match(name) for name in tensors)
    return sorted({int(match[2]) for match in found if match and match[1] == tower})


def content_in_words(names: Iterable[str]) -> str:
    """Say what tensors with these names are, if they are not a whole CLIP in a known layout."""
    every = list(names)

    def any_is(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in every)

    transformers = any_is(r"^(text_model|vision_model)\.")
    known = (
        (any_is(r"lora_"), "LoRA adapters; merge them into the model and save that"),
        (
            any_is(r"^trainable_linearlayer|^fc\.\d+\.(weight|bias)$"),
            "the linear layers of APRIL-GAN, not an encoder; name it as the system's checkpoint",
        ),
        (
            transformers and not any_is(r"^text_model\."),
            "the image tower of transformers' CLIP alone; the text tower is missing",
        ),
        (transformers, "a part of transformers' CLIP: one of several files (shards), or a cut one"),
        (any_is(r"(^|\.)cls_token$"), "a vision transformer without text, such as DINOv2"),
        (
            any_is(r"^(visual\.)?conv1\.weight$") and not any_is(r"token_embedding\.weight$"),
            "the image tower of a CLIP alone; the text tower is missing",
        ),
    )
    more = f" and {len(every) - 3} more tensors" if len(every) > 3 else ""
    content = next((text for found, text in known if found), f"{', '.join(every[:3])}{more}")
    return f"the file holds {content}"
