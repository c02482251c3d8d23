"""Encode windows of patches separately, as WinCLIP does: the tower gets only the patches of one window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from open_clip.transformer import VisionTransformer
from torch import Tensor

from zsad.clip.attention_paths import embed, pool
from zsad.clip.blocks import block_class_token, finish_block, project_in, split_heads

CPU_TOKENS, GPU_TOKENS = 1 << 10, 1 << 14
"""Number of tokens that pass through the blocks at once, which bounds memory for any batch size. On a CPU so few tokens
fit in the cache, which is 8 % faster than 8 times as many."""


def window_patches(grid: int, side: int) -> Int64[Tensor, "n k"]:
    """Return the numbers (row by row, from 0) of the patches in each window of side x side patches, with stride one.

    There are n = (grid - side + 1)^2 windows of k = side^2 patches. Raises ValueError for a window larger than the
    grid.
    """
    if not 1 <= side <= grid:
        raise ValueError(f"windows of {side} x {side} patches in a grid of {grid} x {grid}")
    patches = torch.arange(grid * grid).reshape(grid, grid)
    return patches.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side * side)


def windows_at_a_time(side: int, device: torch.device) -> int:
    """Return how many windows of side x side patches pass through the blocks at once."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // (1 + side**2))


def encode_windows(
    visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], sides: Sequence[int]
) -> list[Float[Tensor, "B n D"]]:
    """Return the class tokens of all windows for each side, in the joint space and not normalised.

    The order is that of `window_patches`. A window's tokens are those of the image that enter block 0, with the class
    token and positions. Tokens and their queries, keys and values in block 0 are the same in all windows, because no
    attention precedes them. They are computed once per image. Windows of the same size and of several images pass
    through the blocks in one batch.

    Parameters
    ----------
    visual
        Tower for which `zsad.clip.attention_paths.unsupported_reason` returns None. It is not changed.
    images
        Images, normalised by the model's mean and standard deviation.
    sides
        Side lengths of the windows in patches, each 1 to g.

    Raises
    ------
    ValueError
        A window is larger than the grid.
    """
    tokens, first = embed(visual, images), visual.transformer.resblocks[0]
    entering = project_in(first, first.ln_1(tokens))
    found = []
    for side in sides:
        windows = window_patches(visual.grid_size[0], side).to(tokens.device)
        with_class = torch.cat([torch.zeros_like(windows[:, :1]), windows + 1], dim=1)
        every = torch.arange(len(images) * len(windows), device=tokens.device)
        parts = []
        # tokens are selected in parts, because the windows of a batch contain each token many times
        for part in torch.split(every, windows_at_a_time(side, tokens.device)):
            picked = part[:, None] // len(windows), with_class[part % len(windows)]
            parts.append(_class_tokens(visual, tokens[picked], entering[picked]))
        found.append(torch.cat(parts).reshape(len(images), len(windows), -1))
    return found


def _class_tokens(
    visual: VisionTransformer, x: Float[Tensor, "n T W"], entering: Float[Tensor, "n T 3*W"]
) -> Float[Tensor, "n D"]:
    """Return the class tokens after all blocks.

    `x` are the tokens that enter block 0. `entering` are their queries, keys and values in block 0, from `project_in`.
    """
    first, *blocks = visual.transformer.resblocks
    x = finish_block(first, x, *split_heads(first, entering))
    for block in blocks[:-1]:
        x = block(x)
    if blocks:
        x = block_class_token(blocks[-1], x) if visual.pool_type == "tok" else blocks[-1](x)
    return pool(visual, x)
