"""Windows of patches, each encoded for itself (WinCLIP): what the tower sees when all other patches are left out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from open_clip.transformer import VisionTransformer
from torch import Tensor

from zsad.paths import embed, pool_of_tokens

CPU_TOKENS, GPU_TOKENS = 1 << 10, 1 << 14
"""Tokens that pass the blocks at a time: bounds memory, whatever the batch. On a CPU, what they become in a block stays
in the cache and in memory that the allocator keeps: 8 % faster than 8 times as many."""


def window_patches(grid: int, side: int) -> Int64[Tensor, "n k"]:
    """Numbers of the patches (row by row, from 0) in each window of side x side patches, all places, stride one.

    n = (grid - side + 1)^2, k = side^2. Raises ValueError for a window larger than the grid.
    """
    if not 1 <= side <= grid:
        raise ValueError(f"windows of {side} x {side} patches in a grid of {grid} x {grid}")
    patches = torch.arange(grid * grid).reshape(grid, grid)
    return patches.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side * side)


def windows_at_a_time(side: int, device: torch.device) -> int:
    """How many windows of side x side patches pass the blocks together."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // (1 + side**2))


def encode_windows(visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], side: int) -> Float[Tensor, "B n D"]:
    """Each window's class token in the joint space, not normalised; the windows in the order of `window_patches`.

    A window's tokens are the image's own, with class token and positions, as they enter block 0. Images are embedded
    once, and windows of one size pass the blocks together, those of several images in one batch.
    """
    tokens = embed(visual, images)
    own = window_patches(visual.grid_size[0], side).to(tokens.device)
    chosen = torch.cat([torch.zeros_like(own[:, :1]), own + 1], dim=1)
    every = torch.arange(len(images) * len(own), device=tokens.device)
    parts = torch.split(every, windows_at_a_time(side, tokens.device))
    # tokens are picked a part at a time: all windows of a batch hold them many times over
    found = [pool_of_tokens(visual, tokens[part[:, None] // len(own), chosen[part % len(own)]]) for part in parts]
    return torch.cat(found).reshape(len(images), len(own), -1)
