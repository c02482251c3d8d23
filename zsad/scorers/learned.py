"""What the learned systems share: their training batch, upsampling, and the losses that 001's eq. 2 names."""

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
"""Of the focal loss: Lin et al. 2017."""
DICE_SMOOTH = 1.0

Weights = dict[str, Tensor]
"""Trained tensors by name."""


@dataclass(frozen=True)
class Batch:
    """Crops to learn from, as the frozen encoder shows them.

    Attributes
    ----------
    class_tokens
        L2-normalised.
    patches
        By output, class tokens left out.
    masks
        True, anomalous, at crop size.
    sources
        Which source, and with it which category, each crop is of.
    """

    class_tokens: Float[Tensor, "B D"]
    patches: Mapping[str, Float[Tensor, "B N _"]]
    masks: Bool[Tensor, "B S S"]
    sources: Int64[Tensor, " B"]

    @property
    def anomalous(self) -> Bool[Tensor, " B"]:
        """Whether any pixel of the crop is."""
        return self.masks.flatten(1).any(dim=1)


@runtime_checkable
class Learner(Protocol):
    """What a learned system is for its training."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Views whose patches a batch must have."""
        ...

    def initial(self, generator: torch.Generator) -> Weights:
        """Untrained weights, on the CPU."""
        ...

    def loss(self, weights: Weights, batch: Batch) -> Float[Tensor, ""]:
        """Mean over the batch's crops; lower is better."""
        ...


def patches_of(store: FeatureStore, number: int, name: str) -> Float[Tensor, "C N _"]:
    """Patches of image `number` by output, without class tokens. Raises InputError."""
    values = store.output(number, name)
    return values[:, 1:] if name.startswith("block-") else values


def upsample(patches: Float[Tensor, "*C N"], size_px: int) -> Float[Tensor, "*C S S"]:
    """Up of 001: values of the patches, row by row, bilinear to a crop's size (align_corners=False, as all maps)."""
    grid = round(patches.shape[-1] ** 0.5)
    maps = patches.reshape(-1, 1, grid, grid)
    grown = functional.interpolate(maps, size=(size_px, size_px), mode="bilinear", align_corners=False)
    return grown.reshape(*patches.shape[:-1], size_px, size_px)


def focal_loss(log_shares: Float[Tensor, "B 2 S S"], masks: Bool[Tensor, "B S S"]) -> Float[Tensor, ""]:
    """-(1 - p)^gamma log p, p the share of the true class; the mean over pixels (Lin et al. 2017, without alpha).

    Parameters
    ----------
    log_shares
        Logarithms of the normal and the anomalous share.
    masks
        True, anomalous.
    """
    log_p = log_shares.gather(1, masks[:, None].long())
    return (-((1 - log_p.exp()) ** GAMMA) * log_p).mean()


def dice_loss(shares: Float[Tensor, "B S S"], truth: Bool[Tensor, "B S S"]) -> Float[Tensor, ""]:
    """1 - (2 sum p y + 1) / (sum p + sum y + 1) for each crop, then the mean (Li et al. 2019, their smooth form)."""
    p, y = shares.flatten(1), truth.flatten(1).to(shares.dtype)
    both = 2 * (p * y).sum(1) + DICE_SMOOTH
    return (1 - both / (p.sum(1) + y.sum(1) + DICE_SMOOTH)).mean()
