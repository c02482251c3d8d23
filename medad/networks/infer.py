"""Prediction: query -> restoration -> segmentation -> P(tumour), for slices in batches.

The order is that of figure 3.1 A of the thesis (Zhang, University of Alberta, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
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
"""Axes along which a slice is flipped. The first entry means no flip."""


@dataclass(frozen=True)
class Networks:
    """Both trained networks on their device, in evaluation mode."""

    restoration: nn.Module
    segmentation: nn.Module
    device: torch.device


@dataclass(frozen=True)
class Prediction:
    """Outputs of the networks for each slice.

    Attributes
    ----------
    probability
        P(tumour) in [0, 1].
    restored
        Restoration as rounded grey values, 0 to 255.
    """

    probability: Float32[ndarray, "N S S"]
    restored: UInt8[ndarray, "N S S"]


def load_networks(restoration: Path, segmentation: Path, device: str) -> Networks:
    """Load both networks. Raises InputError for a missing or damaged one.

    Parameters
    ----------
    restoration, segmentation
        Folder that training wrote, or the file of one network, e.g. a snapshot of phase two.
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
def predict(
    pixels: UInt8[ndarray, "N S S"],
    networks: Networks,
    batch_size: int,
    *,
    flips: Sequence[tuple[int, ...]] = FLIPS[:1],
) -> Prediction:
    """Run both networks over all slices.

    Memory grows with `batch_size`. Besides the two results, it does not grow with N.

    Parameters
    ----------
    pixels
        Prepared slices, grey values 0..255.
    networks
        Networks returned by `load_networks`.
    batch_size
        Slices per batch. It changes speed and memory; results change by rounding only.
    flips
        Versions of a slice over which probability and restoration are averaged: some of `FLIPS`.
    """
    probability = np.empty(pixels.shape, np.float32)
    restored = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        query = torch.from_numpy(pixels[part])[:, None].to(networks.device).float() / 255
        tumour, healthy = torch.zeros_like(query[:, 0]), torch.zeros_like(query[:, 0])
        for axes in flips:
            one_tumour, one_healthy = _predict(query.flip(axes).contiguous(memory_format=torch.channels_last), networks)
            tumour += one_tumour.flip(axes) / len(flips)
            healthy += one_healthy.flip(axes) / len(flips)
        probability[part] = tumour.cpu().numpy()
        restored[part] = (healthy.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Prediction(probability, restored)


def _predict(
    query: Float[Tensor, "B 1 S S"], networks: Networks
) -> tuple[Float[Tensor, "B S S"], Float[Tensor, "B S S"]]:
    """Return P(tumour) and the restoration."""
    healthy = nets.restore(networks.restoration, query)
    logits = nets.segment_logits(networks.segmentation, healthy, query)
    # the softmax of two classes is the sigmoid of their difference, which is exact for small probabilities
    return torch.sigmoid(logits[:, 1] - logits[:, 0]), healthy[:, 0]
