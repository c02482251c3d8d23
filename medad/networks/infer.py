"""Query -> restoration -> segmentation -> P(tumour), slice by slice in batches (000, figure 3.1 A)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from torch import Tensor, nn

from medad.base.devices import keep_freed_memory, pick_device
from medad.networks import nets

FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-1, -2))
"""Axes along which a slice is turned over: not at all first."""


@dataclass(frozen=True)
class Networks:
    """Both trained networks, ready on their device."""

    restoration: nn.Module
    segmentation: nn.Module
    device: torch.device


@dataclass(frozen=True)
class Prediction:
    """What the networks say of each slice.

    Attributes
    ----------
    probability
        P(tumour) in [0, 1].
    restored
        The restoration as grey values, rounded.
    """

    probability: Float32[ndarray, "N S S"]
    restored: UInt8[ndarray, "N S S"]


def load_networks(restoration: Path, segmentation: Path, device: str) -> Networks:
    """Load both networks. Raises InputError for a missing or damaged one.

    Parameters
    ----------
    restoration, segmentation
        A folder that training wrote, or one network's file: a snapshot of phase two.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    place = pick_device(device)
    keep_freed_memory()
    loaded = []
    for role, path in zip(nets.PHASES, (restoration, segmentation), strict=True):
        net = nets.fold_standardisation(nets.load(path if path.is_file() else path / nets.MODEL, role)[0])
        loaded.append(net.to(place).to(memory_format=torch.channels_last).eval())
    return Networks(loaded[0], loaded[1], place)


@torch.inference_mode()
def predict(pixels: UInt8[ndarray, "N S S"], networks: Networks, batch_size: int, *, flips: bool = False) -> Prediction:
    """Run both networks over all slices; memory grows with `batch_size`, not with N beyond the two results.

    Parameters
    ----------
    pixels
        Prepared slices, grey values 0..255.
    networks
        From `load_networks`.
    batch_size
        Slices a batch; changes speed and memory, not results beyond rounding.
    flips
        Mean of probability and restoration over the slice and its mirror images; four times the work.
    """
    probability = np.empty(pixels.shape, np.float32)
    restored = np.empty(pixels.shape, np.uint8)
    flips_used = FLIPS if flips else FLIPS[:1]
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        query = torch.from_numpy(pixels[part])[:, None].to(networks.device).float() / 255
        tumour, healthy = torch.zeros_like(query[:, 0]), torch.zeros_like(query[:, 0])
        for axes in flips_used:
            one_tumour, one_healthy = _predict(query.flip(axes).contiguous(memory_format=torch.channels_last), networks)
            tumour += one_tumour.flip(axes) / len(flips_used)
            healthy += one_healthy.flip(axes) / len(flips_used)
        probability[part] = tumour.cpu().numpy()
        restored[part] = (healthy.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Prediction(probability, restored)


def _predict(
    query: Float[Tensor, "B 1 S S"], networks: Networks
) -> tuple[Float[Tensor, "B S S"], Float[Tensor, "B S S"]]:
    """P(tumour) and restoration."""
    healthy = nets.restore(networks.restoration, query)
    logits = nets.segment_logits(networks.segmentation, healthy, query)
    # the softmax of two classes is a sigmoid of their difference, which keeps small probabilities exact
    return torch.sigmoid(logits[:, 1] - logits[:, 0]), healthy[:, 0]
