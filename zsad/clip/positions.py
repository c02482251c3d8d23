"""Interpolate position embeddings to another number of patches, in the ways of several public programs."""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Interpolation = Literal["bicubic_antialias", "bicubic", "bilinear"]


def square_side(count: int) -> int | None:
    """Return the side of a square of `count` patches. None: it is not a square number."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count and side > 0 else None


def resize_positions(
    positions: Float[Tensor, "n W"], side: int, interpolation: Interpolation, *, offset: float = 0.0
) -> Float[Tensor, "m W"]:
    """Return the embeddings of side x side patches from those of another square of patches, row by row.

    Parameters
    ----------
    positions
        Embeddings of the patches, without the class token.
    side
        Number of patches per side. If it is the stored number, the result is `positions`.
    interpolation
        `bicubic_antialias` is bicubic with a wider kernel if the number becomes smaller.
    offset
        Number that is added to `side` for the scale factor, 0.1 in the code of DINO and DINOv2. The result then
        samples slightly other places, as that code does.

    Raises
    ------
    ValueError
        The stored number of patches is not a square.
    """
    old = square_side(len(positions))
    if old is None:
        raise ValueError(f"{len(positions)} positions are not those of a square of patches")
    if old == side:
        return positions
    grid = positions.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    factor = (side + offset) / old
    resized = functional.interpolate(
        grid,
        **({"scale_factor": (factor, factor)} if offset else {"size": (side, side)}),
        mode="bilinear" if interpolation == "bilinear" else "bicubic",
        align_corners=False,
        antialias=interpolation == "bicubic_antialias",
    )
    return resized.permute(0, 2, 3, 1).reshape(side * side, -1).to(positions.dtype)
