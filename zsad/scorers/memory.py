"""Memory of patches of normal images, for few-shot methods."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.scorers.dual.scorer import visual_scores
from zsad.scorers.learned import patches_of

Memory = dict[str, Float[Tensor, "_ W"]]
"""Patches of each normal image, L2-normalised, by digest."""


def read_memory(shots: FeatureStore | None, output: str, title: str, device: torch.device) -> Memory:
    """Return the patches of an encoder output of all normal images. `title` is the system's name for the message.

    Raises
    ------
    InputError
        The features are damaged or lack the output, or they contain no image.
    """
    if shots is None:
        raise ValueError(f"{title} needs normal images")
    if not len(shots):
        raise InputError(shots.folder, f"contains no image; {title} needs at least one normal image")
    patches = (patches_of(shots, number, output).flatten(0, 1) for number in range(len(shots)))
    units = (functional.normalize(one.to(device), dim=-1) for one in patches)
    return dict(zip(shots.digests, units, strict=True))


def distances_to(memory: Memory, patches: Float[Tensor, "C N W"], digest: str) -> Float[Tensor, "C N"]:
    """Return the distance 1 - cos of each patch to the nearest patch of the memory, 0..2.

    The image `digest` itself is left out of the memory; another one must be in it.
    """
    units = functional.normalize(patches, dim=-1).flatten(0, 1)
    others = [tokens for other, tokens in memory.items() if other != digest]
    # rounding can make the distance of equal patches negative
    return visual_scores(units, others).clamp_min(0).reshape(patches.shape[:2])
