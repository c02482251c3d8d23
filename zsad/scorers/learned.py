"""Code that the learned systems share: the training batch, upsampling, and losses.

The losses are those of eq. 2 of the AnomalyCLIP paper (Zhou et al., ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from zsad.clip.feature_store import FeatureStore

GAMMA = 2.0
"""Exponent of the focal loss (Lin et al. 2017)."""
DICE_SMOOTH = 1.0

Weights = dict[str, Tensor]
"""Trained tensors by name."""


@dataclass(frozen=True)
class Batch:
    """Crops to learn from: features of the frozen encoder, and masks.

    Attributes
    ----------
    class_tokens
        Class tokens, L2-normalised.
    patches
        Patches by output, without class tokens.
    masks
        Masks at crop size; True is anomalous.
    sources
        Number of the source of each crop. One source is one category.
    """

    class_tokens: Float[Tensor, "B D"]
    patches: Mapping[str, Float[Tensor, "B N _"]]
    masks: Bool[Tensor, "B S S"]
    sources: Int64[Tensor, " B"]

    @property
    def anomalous(self) -> Bool[Tensor, " B"]:
        """Return for each crop whether any of its pixels is anomalous."""
        return self.masks.flatten(1).any(dim=1)


@runtime_checkable
class Learner(Protocol):
    """Interface of a learned system for its training."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the encoder outputs that a batch must have."""
        ...

    def initial(self, generator: torch.Generator) -> Weights:
        """Return untrained weights, on the CPU."""
        ...

    def loss(self, weights: Weights, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean loss over the batch's crops; lower is better."""
        ...


def patches_of(store: FeatureStore, number: int, name: str) -> Float[Tensor, "C N _"]:
    """Return the patches of image `number` from one encoder output, without class tokens. Raise InputError."""
    values = store.output(number, name)
    return values[:, 1:] if name.startswith("block-") else values


def upsample(patches: Float[Tensor, "*C N"], size_px: int, *, align_corners: bool = False) -> Float[Tensor, "*C S S"]:
    """Return Up of the AnomalyCLIP paper: patch values (row by row), interpolated bilinearly to the size of a crop.

    `align_corners` is as in `zsad.data.images.merge_maps`.
    """
    grid = round(patches.shape[-1] ** 0.5)
    maps = patches.reshape(-1, 1, grid, grid)
    grown = functional.interpolate(maps, size=(size_px, size_px), mode="bilinear", align_corners=align_corners)
    return grown.reshape(*patches.shape[:-1], size_px, size_px)


def focal_loss(log_shares: Float[Tensor, "B 2 S S"], masks: Bool[Tensor, "B S S"]) -> Float[Tensor, ""]:
    """Return the mean over pixels of -(1 - p)^gamma log p (Lin et al. 2017, without alpha).

    p is the share of the true class.

    Parameters
    ----------
    log_shares
        Logarithms of the normal and the anomalous share.
    masks
        Masks; True is anomalous.
    """
    log_p = log_shares.gather(1, masks[:, None].long())
    return (-((1 - log_p.exp()) ** GAMMA) * log_p).mean()


def dice_loss(shares: Float[Tensor, "B S S"], truth: Bool[Tensor, "B S S"]) -> Float[Tensor, ""]:
    """Return the mean over crops of 1 - (2 sum p y + 1) / (sum p + sum y + 1) (Li et al. 2019, smooth form)."""
    p, y = shares.flatten(1), truth.flatten(1).to(shares.dtype)
    both = 2 * (p * y).sum(1) + DICE_SMOOTH
    return (1 - both / (p.sum(1) + y.sum(1) + DICE_SMOOTH)).mean()
