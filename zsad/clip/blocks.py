"""Parts of a block of an open_clip vision transformer, for code that needs only some parts or needs a part twice.

A block computes `x = x + attention(LN1(x))`, then `x = x + feed_forward(LN2(x))`. These are plain functions over the
block's modules, which are not changed or copied.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.nn import functional

QUERIES_KEYS_VALUES, QUERIES, KEYS_VALUES, VALUES = slice(0, 3), slice(0, 1), slice(1, 3), slice(2, 3)
"""Slices of queries, keys and values, in the order of a block's weights."""


def project_in(
    block: ResidualAttentionBlock, normed: Float[Tensor, "B T W"], parts: slice = QUERIES_KEYS_VALUES
) -> Float[Tensor, "B T _"]:
    """Return queries, keys and values, or some of them, side by side in one tensor.

    `normed` are the tokens after LN1. Each token is projected separately.
    """
    width = normed.shape[-1]
    rows = slice(parts.start * width, parts.stop * width)
    projected: Tensor = functional.linear(normed, block.attn.in_proj_weight[rows], block.attn.in_proj_bias[rows])
    return projected


def split_heads(
    block: ResidualAttentionBlock, projected: Float[Tensor, "B T _"]
) -> tuple[Float[Tensor, "B h T w"], ...]:
    """Split the result of `project_in` into queries, keys and values, each by attention heads h."""
    shape = (*projected.shape[:2], block.attn.num_heads, -1)
    parts = torch.split(projected, block.attn.embed_dim, dim=-1)
    return tuple(part.reshape(shape).transpose(1, 2) for part in parts)


def attend(
    block: ResidualAttentionBlock,
    q: Float[Tensor, "B h Q w"],
    k: Float[Tensor, "B h T w"],
    v: Float[Tensor, "B h T w"],
    scale: float | None = None,
) -> Float[Tensor, "B Q W"]:
    """Return the attention after the block's output projection. `scale` multiplies the logits. None: w^-0.5."""
    dropout = block.attn.dropout if block.training else 0.0
    attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    projected: Tensor = block.attn.out_proj(attended.transpose(1, 2).flatten(2))
    return projected


def finish_block(
    block: ResidualAttentionBlock,
    x: Float[Tensor, "B Q W"],
    q: Float[Tensor, "B h Q w"],
    k: Float[Tensor, "B h T w"],
    v: Float[Tensor, "B h T w"],
) -> Float[Tensor, "B Q W"]:
    """Return tokens after the block. `x` are the Q tokens before the block that belong to the queries `q`."""
    x = x + block.ls_1(attend(block, q, k, v))
    left: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return left


def block_class_token(block: ResidualAttentionBlock, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B 1 W"]:
    """Return only the class token after the block. No query or feed-forward is computed for the other tokens."""
    normed = block.ln_1(x)
    (q,) = split_heads(block, project_in(block, normed[:, :1], QUERIES))
    k, v = split_heads(block, project_in(block, normed, KEYS_VALUES))
    return finish_block(block, x[:, :1], q, k, v)
