"""Largest cosines between the patches of two images, in 32 bits or in bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

PIECE_PATCHES = 1 << 12
"""Largest number of patches of an image multiplied at a time. So a product takes at most 64 MiB for any image."""


@dataclass(frozen=True)
class Operand:
    """Patches of an image in pieces, ready to be multiplied."""

    pieces: tuple[Tensor, ...]
    bias: Tensor | None = None
    """Minus one for each patch of a piece, in bf16. None: 32 bits."""


def operand(patches: Float[Tensor, "P D"], *, bf16: bool = False) -> Operand:
    """Prepare the patches of one image for `largest_cosines`."""
    if bf16:
        pieces = torch.split(patches.bfloat16(), PIECE_PATCHES)
        return Operand(pieces, torch.full((len(pieces[0]),), -1, dtype=torch.bfloat16, device=patches.device))
    pieces = torch.split(patches, PIECE_PATCHES)
    # oneDNN took half the time of torch's default (MKL) on an AMD processor
    in_one_dnn = patches.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return Operand(tuple(piece.to_mkldnn() for piece in pieces) if in_one_dnn else pieces)


def largest_cosines(first: Operand, second: Operand) -> tuple[Float[Tensor, " P"], Float[Tensor, " Q"]]:
    """Return each first-image patch's largest cosine to the second image, and the reverse, from one product.

    The largest cosine of each row belongs to the first image's patches, that of each column to the second image's.
    """
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for piece in first.pieces:
        products = [_product(piece, other, second.bias) for other in second.pieces]
        rows.append(torch.stack([product.amax(1) for product in products]).amax(0))
        found = [product.amax(0) for product in products]
        columns = [torch.maximum(*both) for both in zip(columns, found, strict=True)] if columns else found
    to_second, to_first = torch.cat(rows), torch.cat(columns)
    if second.bias is not None:
        to_second, to_first = 1 + to_second.float(), 1 + to_first.float()
    return to_second, to_first


def _product(first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """Return the cosines. In bf16: the cosines minus one, so that only the small distance is rounded to 8 bits."""
    if bias is not None:
        return functional.linear(first, second, bias[: len(second)])
    product = functional.linear(first, second)
    return product.to_dense() if product.is_mkldnn else product
