"""Windows of patches, each encoded for itself (WinCLIP): what the tower sees when all other patches are left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from open_clip.transformer import VisionTransformer
from torch import Tensor

from zsad.clip.attention_paths import embed, pool
from zsad.clip.blocks import block_class_token, finish_block, project_in, split_heads

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


def encode_windows(
    visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], sides: Sequence[int]
) -> list[Float[Tensor, "B n D"]]:
    """For each side, its windows' class tokens in the joint space, not normalised, in the order of `window_patches`.

    A window's tokens are the image's own, with class token and positions, as they enter block 0. What is the same in
    all windows is computed once an image: its tokens, and their queries, keys and values in block 0, where they have
    met no others yet. Windows of one size pass the blocks together, those of several images in one batch.

    Parameters
    ----------
    visual
        A tower without `zsad.clip.attention_paths.unsupported_reason`, used as it is.
    images
        Normalised by the model's mean and standard deviation.
    sides
        Of windows, in patches, each 1 to g.

    Raises
    ------
    ValueError
        A window is larger than the grid.
    """
    tokens, first = embed(visual, images), visual.transformer.resblocks[0]
    entering = project_in(first, first.ln_1(tokens))
    found = []
    for side in sides:
        own = window_patches(visual.grid_size[0], side).to(tokens.device)
        chosen = torch.cat([torch.zeros_like(own[:, :1]), own + 1], dim=1)
        every = torch.arange(len(images) * len(own), device=tokens.device)
        parts = []
        # tokens are picked a part at a time: all windows of a batch hold them many times over
        for part in torch.split(every, windows_at_a_time(side, tokens.device)):
            picked = part[:, None] // len(own), chosen[part % len(own)]
            parts.append(_class_tokens(visual, tokens[picked], entering[picked]))
        found.append(torch.cat(parts).reshape(len(images), len(own), -1))
    return found


def _class_tokens(
    visual: VisionTransformer, x: Float[Tensor, "n T W"], entering: Float[Tensor, "n T 3*W"]
) -> Float[Tensor, "n D"]:
    """What the tower makes of tokens that enter block 0, with what `project_in` gave for them there."""
    first, *blocks = visual.transformer.resblocks
    x = finish_block(first, x, *split_heads(first, entering))
    for block in blocks[:-1]:
        x = block(x)
    if blocks:
        x = block_class_token(blocks[-1], x) if visual.pool_type == "tok" else blocks[-1](x)
    return pool(visual, x)
