"""Rename the tensors of DINOv2 and DINO to timm's names, from the names that Meta and transformers use."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIXES = ("teacher.", "student.", "backbone.", "dinov2.", "dinov2_with_registers.", "vit.")
_UNUSED = re.compile(r"mask_token|pooler\..*|classifier\..*|head\..*|last_layer\..*|dino_head\..*|ibot_head\..*")
"""Names of tensors that no output needs."""
_TRANSFORMERS = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.mask_token", "mask_token"),
    (r"embeddings\.register_tokens", "register_tokens"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
    (r"encoder\.layer\.(\d+)\.(?:norm1|layernorm_before)\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.(?:norm2|layernorm_after)\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(?:mlp\.fc1|intermediate\.dense)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.(?:mlp\.fc2|output\.dense)\.", r"blocks.\1.mlp.fc2."),
)
"""Beginnings of names in transformers, and in Meta's programs."""
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")
"""Blocks in chunks, as Meta's training writes them. The second number counts all blocks."""


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return tensors by timm's names. None: they are not those of a vision transformer of this kind.

    Queries, keys and values become one tensor. Prefixes such as `backbone.` are removed, and parts that are only used
    in training are left out. If register tokens have no position but the class token has one, as in Meta's files, that
    position is added to the class token, because timm's models with registers have positions of patches only.
    """
    named = _without_prefixes(tensors)
    if any(name.startswith("embeddings.") for name in named):
        named = {_renamed(name): tensor for name, tensor in named.items()}
    named = {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in named.items()}
    named = {name: tensor for name, tensor in named.items() if not _UNUSED.fullmatch(name)}
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= named.keys():
        return None
    joined = {name: tensor for name, tensor in named.items() if ".attn.query." not in name}
    for name in named:
        if ".attn.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if not named.keys() >= set(parts):
                return None
            for part in parts[1:]:
                joined.pop(part)
            joined[name.replace(".query.", ".qkv.")] = torch.cat([named[part] for part in parts])
    registers = joined.pop("register_tokens", None)
    if registers is not None:
        joined["reg_token"] = registers
        joined["cls_token"] = joined["cls_token"] + joined["pos_embed"][:, :1]
        joined["pos_embed"] = joined["pos_embed"][:, 1:]
    return joined


def _renamed(name: str) -> str:
    for pattern, replacement in _TRANSFORMERS:
        new, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return new
    return name


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that all tensors have in common with the backbone. Tensors outside the backbone are dropped."""
    named = dict(tensors)
    again = True
    while again:
        again = False
        for prefix in _PREFIXES:
            inside = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
            if inside:
                named, again = inside, True
                break
    return named
