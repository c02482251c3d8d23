"""Number formats in which an image tower runs: 32, or 16 bits on GPUs whose tensor cores are made for it."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = 7.0
"""Smallest compute capability of NVIDIA's GPUs with tensor cores for fp16."""


def effective_precision(wanted: Literal["auto"] | Precision, capability: float | None) -> Precision:
    """Return the number format for a setting `encoder.precision`.

    `auto` is fp16 on a GPU with tensor cores, else fp32. It is not bf16, whose values have 8 bits instead of 11: see
    docs/how-to/clip-weights.md for what both change.

    Parameters
    ----------
    wanted
        Value of the setting.
    capability
        Compute capability of the GPU, such as 8.6. None: the CPU, or a GPU that does not say it.
    """
    if wanted != "auto":
        return wanted
    return "fp16" if capability is not None and capability >= TENSOR_CORES else "fp32"


def capability_of(device: torch.device) -> float | None:
    """Return the compute capability of a GPU. None: the device is not an NVIDIA GPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major + minor / 10
