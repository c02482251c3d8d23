"""The two-way forward of a CLIP vision transformer (002, section 3.1, eq. 4): class token and V-V patch tokens.

Both paths share every block's LayerNorm and value projection, so the V-V path costs one attention and one output
projection a block. It is a plain function over the public modules of an open_clip tower: nothing is patched or copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Paths:
    """What the second path does.

    Parameters
    ----------
    vv_blocks
        Numbers of the blocks that add to it, from 0, rising, at least one.
    feed_forward
        Whether those blocks' feed-forward runs on it too. The paper's does not.
    temperature
        Divides the logits of V-V attention, beside 1/sqrt(head width). Lower: each token looks at itself alone.
    class_ln_post
        Whether the class token passes the tower's last LayerNorm before the projection, as CLIP makes it.
    """

    vv_blocks: tuple[int, ...]
    feed_forward: bool = False
    temperature: float = 1.0
    class_ln_post: bool = True

    def __post_init__(self) -> None:
        if not self.vv_blocks or any(a >= b for a, b in zip((-1, *self.vv_blocks), self.vv_blocks, strict=False)):
            raise ValueError(f"V-V blocks {list(self.vv_blocks)} are not rising numbers from 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not positive")


def obstacle(visual: torch.nn.Module) -> str | None:
    """Why this tower cannot have the second path, in a few words; None if it can."""
    if not isinstance(visual, VisionTransformer):
        return f"its image tower is a {type(visual).__name__}, not open_clip's own vision transformer"
    if visual.attn_pool is not None or visual.pool_type == "none":
        return "its image tower pools by attention, so that patches are not in the joint space"
    if not all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks):
        return "its image tower has custom attention blocks"
    height, width = visual.grid_size
    return None if height == width else f"its image tower sees {height} x {width} patches, not a square"


def two_path(
    visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], paths: Paths
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B N D"]]:
    """Run both paths in one forward.

    With `x_l` the tokens that enter block `l` of the original path, `VV_l` its attention with the values as queries
    and keys, and `f` the first V-V block, `x_vv = x_f + sum_l VV_l(LN1_l(x_l))` (feed-forward off). Then the last
    LayerNorm and the projection, as for the class token. Differentiable.

    Parameters
    ----------
    visual
        A tower without `obstacle`; used as it is, in its own mode and dtype.
    images
        Normalised by the model's mean and standard deviation.
    paths
        Which blocks, and how.

    Returns
    -------
    tuple
        The class token, equal to `visual(images)` where `class_ln_post` is set, and the N patch tokens row by row,
        both in the joint space of dimension D and not normalised.

    Raises
    ------
    ValueError
        A V-V block that the tower does not have.
    """
    x, x_vv = _run(visual, images, paths, patches_only=False)
    return _pool(visual, x, ln_post=paths.class_ln_post), _project(visual, x_vv[:, 1:])


def patch_path(visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], paths: Paths) -> Float[Tensor, "B N D"]:
    """The patch tokens of `two_path` alone: what comes after the last V-V block's values is not computed."""
    return _project(visual, _run(visual, images, paths, patches_only=True)[1][:, 1:])


def _run(visual: VisionTransformer, images: Tensor, paths: Paths, *, patches_only: bool) -> tuple[Tensor, Tensor]:
    """The tokens of either path after the blocks; of the original path, those that are needed at the end."""
    blocks: Sequence[ResidualAttentionBlock] = visual.transformer.resblocks
    if paths.vv_blocks[-1] >= len(blocks):
        raise ValueError(f"V-V block {paths.vv_blocks[-1]} of a tower whose blocks are 0 to {len(blocks) - 1}")
    x = _embed(visual, images)
    x_vv = x
    for number, block in enumerate(blocks):
        last = patches_only and number == paths.vv_blocks[-1]
        if number not in paths.vv_blocks:
            x = block(x)
            continue
        if number == paths.vv_blocks[0]:
            x_vv = x
        q, k, v = _project_in(block, block.ln_1(x), values_only=last)
        scale = v.shape[-1] ** -0.5
        x_vv = x_vv + block.ls_1(_attend(block, v, v, v, scale / paths.temperature))
        if paths.feed_forward:
            x_vv = x_vv + block.ls_2(block.mlp(block.ln_2(x_vv)))
        if last:
            break
        if number == len(blocks) - 1 and visual.pool_type == "tok":
            x, q = x[:, :1], q[:, :, :1]  # only the class token leaves the original path
        x = x + block.ls_1(_attend(block, q, k, v, scale))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, x_vv


def _embed(visual: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens that enter block 0: class token, then patches row by row."""
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    embedded: Tensor = visual.ln_pre(visual.patch_dropout(tokens))
    return embedded


def _project_in(block: ResidualAttentionBlock, normed: Tensor, *, values_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by one product, each [B heads tokens head-width]; or the values in all three places."""
    width = normed.shape[-1]
    rows = slice(2 * width if values_only else 0, None)
    projected = functional.linear(normed, block.attn.in_proj_weight[rows], block.attn.in_proj_bias[rows])
    shape = (*normed.shape[:2], block.attn.num_heads, -1)
    parts = [part.reshape(shape).transpose(1, 2) for part in projected.chunk(1 if values_only else 3, dim=-1)]
    return parts[0], parts[len(parts) // 2], parts[-1]


def _attend(block: ResidualAttentionBlock, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention and the block's output projection."""
    dropout = block.attn.dropout if block.training else 0.0
    attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    projected: Tensor = block.attn.out_proj(attended.transpose(1, 2).flatten(2))
    return projected


def _pool(visual: VisionTransformer, x: Tensor, *, ln_post: bool) -> Tensor:
    """The image's one token in the joint space, as the tower itself pools."""
    normalise = visual.ln_post if ln_post else torch.nn.Identity()
    if visual.pool_type == "tok":
        pooled = normalise(x[:, 0])  # LayerNorm is by token: picking one first gives the same
    elif visual.final_ln_after_pool:
        pooled = normalise(x[:, 1:].mean(dim=1))
    else:
        pooled = normalise(x)[:, 1:].mean(dim=1)
    joint: Tensor = pooled @ visual.proj
    return joint


def _project(visual: VisionTransformer, patches: Tensor) -> Tensor:
    joint: Tensor = visual.ln_post(patches) @ visual.proj
    return joint
