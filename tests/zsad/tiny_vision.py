"""Make DINOv2 and DINO models of timm with random parameters, and write them with the names of other programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from zsad.config.vision_models import VISION_MODELS

State = dict[str, Tensor]


def random_model(name: str, size_px: int | None = None, seed: int = 0) -> Any:
    """Return a model of timm in which every parameter matters. In a new one, layer scale and biases are almost 0."""
    vision = VISION_MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = timm.create_model(
            vision.architecture, pretrained=False, num_classes=0, img_size=size_px or vision.size_px
        )
        for key, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim < 2 else 0.5 / math.sqrt(parameter.shape[-1])
            scale = 1.0 if key == "pos_embed" else scale
            parameter.data = scale * torch.randn(parameter.shape)
            if key.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
                parameter.data += 0.7
    return model.eval()


def meta_state(model: Any) -> State:
    """Return a model's tensors with Meta's names: those of timm, except for registers and positions."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["mask_token"] = torch.zeros(1, model.embed_dim)
    if "reg_token" in state:
        # Meta's files have a position of the class token. timm's model has none: the sum is the same.
        place = torch.full((1, 1, model.embed_dim), 0.25)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - place
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    return state


def transformers_state(model: Any, *, dino: bool) -> State:
    """Return a model's tensors with the names of transformers' Dinov2Model or ViTModel."""
    meta = meta_state(model)
    state = {
        "embeddings.cls_token": meta["cls_token"],
        "embeddings.position_embeddings": meta["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": meta["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": meta["patch_embed.proj.bias"],
        "layernorm.weight": meta["norm.weight"],
        "layernorm.bias": meta["norm.bias"],
    }
    if "register_tokens" in meta:
        state["embeddings.register_tokens"] = meta["register_tokens"]
    if dino:
        state["pooler.dense.weight"] = torch.zeros(model.embed_dim, model.embed_dim)
    else:
        state["embeddings.mask_token"] = meta["mask_token"]
    for number in range(len(model.blocks)):
        ours, theirs = f"blocks.{number}.", f"encoder.layer.{number}."
        for kind in ("weight", "bias"):
            q, k, v = meta[f"{ours}attn.qkv.{kind}"].chunk(3)
            state[f"{theirs}attention.attention.query.{kind}"] = q.clone()
            state[f"{theirs}attention.attention.key.{kind}"] = k.clone()
            state[f"{theirs}attention.attention.value.{kind}"] = v.clone()
            state[f"{theirs}attention.output.dense.{kind}"] = meta[f"{ours}attn.proj.{kind}"]
            names = (
                {"norm1": "layernorm_before", "norm2": "layernorm_after"}
                | {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
                if dino
                else {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
            )
            for name, other in names.items():
                state[f"{theirs}{other}.{kind}"] = meta[f"{ours}{name}.{kind}"]
        if not dino:
            state[f"{theirs}layer_scale1.lambda1"] = meta[f"{ours}ls1.gamma"]
            state[f"{theirs}layer_scale2.lambda1"] = meta[f"{ours}ls2.gamma"]
    return state


def write_state(state: State, path: Path) -> Path:
    """Write tensors as safetensors, or as torch.save does if the name says so."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path
