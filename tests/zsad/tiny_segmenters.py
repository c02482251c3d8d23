"""Make small CLIPSeg, SAM and salient-object models for tests, with random parameters, in the usual file formats."""

from __future__ import annotations

import math
import string
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    SamConfig,
    SamImageProcessor,
    SamModel,
    ViTImageProcessor,
)
from transformers.utils import logging

SAM_PX = 64
CLIPSEG_PX = 32


def _seeded(model_class: Any, config: Any, seed: int, gain: float = 1.0) -> Any:
    """Return a model with random parameters, biases included. A larger `gain` makes its outputs more extreme."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else gain / math.sqrt(parameter[0].numel())
            parameter.data += scale * torch.randn(parameter.shape)
    return model


def _save(folder: Path, *parts: Any) -> Path:
    logging.disable_progress_bar()
    for part in parts:
        part.save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


def write_clipseg(folder: Path, seed: int = 0) -> Path:
    """Write a CLIPSeg model with three layers and letters as tokens."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config=tower
        | {"vocab_size": 54, "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config=tower | {"image_size": CLIPSEG_PX, "patch_size": 8},
        projection_dim=12,
        extract_layers=[0, 1, 2],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    pieces = [
        "<|startoftext|>",
        "<|endoftext|>",
        *string.ascii_lowercase,
        *(f"{c}</w>" for c in string.ascii_lowercase),
    ]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    size = {"height": CLIPSEG_PX, "width": CLIPSEG_PX}
    processor = CLIPSegProcessor(image_processor=ViTImageProcessor(size=size), tokenizer=tokenizer)
    return _save(folder, _seeded(CLIPSegForImageSegmentation, config, seed), processor)


def write_sam(folder: Path, seed: int = 0, gain: float = 1.0) -> Path:
    """Write a SAM model with two layers and an input of 64 px."""
    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SAM_PX,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 32,
            "num_pos_feats": 4,
        },
        prompt_encoder_config={"hidden_size": 8, "image_size": SAM_PX, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 8,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_depth": 2,
            "iou_head_hidden_dim": 8,
        },
    )
    square, quarter = ({"height": side, "width": side} for side in (SAM_PX, SAM_PX // 4))
    processor = SamImageProcessor(
        size={"longest_edge": SAM_PX},
        pad_size=square,
        mask_size={"longest_edge": SAM_PX // 4},
        mask_pad_size=quarter,
    )
    return _save(folder, _seeded(SamModel, config, seed, gain), processor)


class Brightness(nn.Module):
    """Salient-object model that returns the mean of the channels as probability."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean(dim=1, keepdim=True)


def write_salient(path: Path, network: nn.Module | None = None) -> Path:
    """Write a network as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but such files are still used
        torch.jit.script(network or Brightness()).save(str(path))  # type: ignore[no-untyped-call]
    return path
