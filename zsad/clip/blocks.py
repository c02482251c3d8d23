"""A block of an open_clip vision transformer in parts, for those who need only some of it, or need some of it twice.

A block is `x = x + attention(LN1(x))`, then `x = x + feed_forward(LN2(x))`. Plain functions over its own modules:
nothing is patched or copied.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.nn import functional

QUERIES_KEYS_VALUES, QUERIES, KEYS_VALUES, VALUES = slice(0, 3), slice(0, 1), slice(1, 3), slice(2, 3)
"""Of queries, keys and values, in the order of a block's weights."""


def project_in(
    block: ResidualAttentionBlock, normed: Float[Tensor, "B T W"], parts: slice = QUERIES_KEYS_VALUES
) -> Float[Tensor, "B T _"]:
    """Queries, keys and values, or some of them, by one product and beside each other; `normed` has passed LN1.

    A token's are its own, whatever other tokens are there.
    """
    width = normed.shape[-1]
    rows = slice(parts.start * width, parts.stop * width)
    projected: Tensor = functional.linear(normed, block.attn.in_proj_weight[rows], block.attn.in_proj_bias[rows])
    return projected


def split_heads(
    block: ResidualAttentionBlock, projected: Float[Tensor, "B T _"]
) -> tuple[Float[Tensor, "B h T w"], ...]:
    """What `project_in` gave, one by one, and by attention heads h."""
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
    """Attention and the block's output projection; `scale` multiplies the logits, None: w^-0.5."""
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
    """The tokens `x` as they leave the block: those of the T that entered it whose queries `q` are."""
    x = x + block.ls_1(attend(block, q, k, v))
    left: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return left


def block_class_token(block: ResidualAttentionBlock, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B 1 W"]:
    """The class token as it leaves the block: it alone asks, and passes the feed-forward."""
    normed = block.ln_1(x)
    (q,) = split_heads(block, project_in(block, normed[:, :1], QUERIES))
    k, v = split_heads(block, project_in(block, normed, KEYS_VALUES))
    return finish_block(block, x[:, :1], q, k, v)
