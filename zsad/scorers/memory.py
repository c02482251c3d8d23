"""Memory of patches of normal images, for few-shot methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.scorers.cosines import largest_cosines, operand
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


def has_others(memory: Memory, digest: str) -> bool:
    """Return whether the memory has a normal image that is not this image."""
    return any(other != digest for other in memory)


def distances_to(
    memory: Memory, patches: Float[Tensor, "C N W"], digest: str, *, bf16: bool = False
) -> Float[Tensor, "C N"]:
    """Return the distance 1 - cos of each patch to the nearest patch of the memory, 0..2.

    The image `digest` itself is left out of the memory; another one must be in it. With `bf16`, products are computed
    in this format. The cosine minus one is rounded, so distances change by less than 0.002.
    """
    units = functional.normalize(patches, dim=-1).flatten(0, 1)
    others = [tokens for other, tokens in memory.items() if other != digest]
    found = _nearest_in_bf16(units, others) if bf16 else visual_scores(units, others)
    # rounding can make the distance of equal patches negative
    return found.clamp_min(0).reshape(patches.shape[:2])


def _nearest_in_bf16(units: Float[Tensor, "P W"], others: Sequence[Float[Tensor, "_ W"]]) -> Float[Tensor, " P"]:
    query = operand(units, bf16=True)
    nearest = [largest_cosines(query, operand(tokens, bf16=True))[0] for tokens in others]
    return 1 - torch.stack(nearest).amax(0)
