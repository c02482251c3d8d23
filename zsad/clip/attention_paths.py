"""The two-way forward of a CLIP vision transformer (002, section 3.1, eq. 4): class token and V-V patch tokens.

Both paths share every block's LayerNorm and value projection, so the V-V path costs one attention and one output
projection a block. It is a plain function over the public modules of an open_clip tower: nothing is patched or copied.
What other systems read on the way, the patches of the original path and the tokens that blocks give, comes from the
same forward (`outputs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

from zsad.clip.blocks import VALUES, attend, block_class_token, finish_block, project_in, split_heads

Attention = Literal["vv", "qq", "kk"]
"""What the second path's attention takes as both queries and keys (001, DPAM)."""


@dataclass(frozen=True)
class AttentionPath:
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
    attention
        The values, the queries or the keys in the place of both queries and keys; what is mixed are the values.
    """

    vv_blocks: tuple[int, ...]
    feed_forward: bool = False
    temperature: float = 1.0
    class_ln_post: bool = True
    attention: Attention = "vv"

    def __post_init__(self) -> None:
        if not self.vv_blocks or any(a >= b for a, b in zip((-1, *self.vv_blocks), self.vv_blocks, strict=False)):
            raise ValueError(f"V-V blocks {list(self.vv_blocks)} are not rising numbers from 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not positive")


def unsupported_reason(visual: torch.nn.Module) -> str | None:
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
    visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], path: AttentionPath
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B N D"]]:
    """Run both paths in one forward.

    With `x_l` the tokens that enter block `l` of the original path, `VV_l` its attention with the values as queries
    and keys, and `f` the first V-V block, `x_vv = x_f + sum_l VV_l(LN1_l(x_l))` (feed-forward off). Then the last
    LayerNorm and the projection, as for the class token. Differentiable.

    Parameters
    ----------
    visual
        A tower without `unsupported_reason`; used as it is, in its own mode and dtype.
    images
        Normalised by the model's mean and standard deviation.
    path
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
    found = _run_paths(visual, images, path)
    return pool(visual, found.x, ln_post=path.class_ln_post), _project(visual, found.x_vv[:, 1:])


@dataclass(frozen=True)
class TowerOutputs:
    """What one forward shows; nothing is normalised.

    Attributes
    ----------
    class_token
        As `two_path` gives it.
    patches
        As `two_path` gives them; None where not asked for.
    last_tokens, plain_patches
        Patch tokens of the original path after the last LayerNorm, in the tower's width, and the same after the
        projection; None where not asked for.
    blocks
        The tokens that each block asked for gives (the class token first), by its number from 0, in the tower's width.
    vv_patches
        Patches of the second path as they are after each block asked for, in the joint space, by its number from 0.
    """

    class_token: Float[Tensor, "B D"]
    patches: Float[Tensor, "B N D"] | None
    last_tokens: Float[Tensor, "B N W"] | None
    plain_patches: Float[Tensor, "B N D"] | None
    blocks: Mapping[int, Float[Tensor, "B T W"]]
    vv_patches: Mapping[int, Float[Tensor, "B N D"]]


def tower_outputs(
    visual: VisionTransformer,
    images: Float[Tensor, "B 3 S S"],
    path: AttentionPath,
    *,
    patches: bool = True,
    plain_patches: bool = False,
    blocks: Sequence[int] = (),
    vv_blocks: Sequence[int] = (),
) -> TowerOutputs:
    """`two_path` with more of what it passes by, or with less; blocks are numbered from 0.

    Of the second path, only the blocks are computed that what is asked for needs. Raises ValueError for a block that is
    not there.
    """
    wanted = sorted({*blocks, *vv_blocks})
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(visual.transformer.resblocks):
        raise ValueError(f"blocks {wanted} of a tower whose blocks are 0 to {len(visual.transformer.resblocks) - 1}")
    found = _run_paths(
        visual,
        images,
        path,
        patches=patches,
        plain_patches=plain_patches,
        wanted_blocks=frozenset(blocks),
        wanted_vv_blocks=frozenset(vv_blocks),
    )
    last = visual.ln_post(found.x[:, 1:]) if plain_patches else None
    return TowerOutputs(
        class_token=pool(visual, found.x, ln_post=path.class_ln_post),
        patches=_project(visual, found.x_vv[:, 1:]) if patches else None,
        last_tokens=last,
        plain_patches=None if last is None else last @ visual.proj,
        blocks=found.blocks,
        vv_patches={number: _project(visual, x_vv[:, 1:]) for number, x_vv in found.vv_blocks.items()},
    )


def patch_path(
    visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], path: AttentionPath
) -> Float[Tensor, "B N D"]:
    """The patch tokens of `two_path` alone: what comes after the last V-V block's values is not computed."""
    return _project(visual, _run_paths(visual, images, path, patches_only=True).x_vv[:, 1:])


@dataclass(frozen=True)
class _PathTokens:
    x: Tensor
    """The original path's tokens after the blocks; the class token alone where no more is needed."""
    x_vv: Tensor
    """The second path's tokens after the last block of it that was needed."""
    blocks: dict[int, Tensor]
    vv_blocks: dict[int, Tensor]
    """The second path's tokens after the blocks asked for."""


def _run_paths(
    visual: VisionTransformer,
    images: Tensor,
    path: AttentionPath,
    *,
    patches_only: bool = False,
    patches: bool = True,
    plain_patches: bool = False,
    wanted_blocks: frozenset[int] = frozenset(),
    wanted_vv_blocks: frozenset[int] = frozenset(),
) -> _PathTokens:
    """Both paths through the blocks; of either, what is needed at the end."""
    blocks: Sequence[ResidualAttentionBlock] = visual.transformer.resblocks
    if path.vv_blocks[-1] >= len(blocks):
        raise ValueError(f"V-V block {path.vv_blocks[-1]} of a tower whose blocks are 0 to {len(blocks) - 1}")
    x = embed(visual, images)
    x_vv = x
    second = {number for number in path.vv_blocks if patches or any(number <= wanted for wanted in wanted_vv_blocks)}
    block_tokens: dict[int, Tensor] = {}
    vv_block_tokens: dict[int, Tensor] = {}
    for number, block in enumerate(blocks):
        last = patches_only and number == path.vv_blocks[-1]
        all_tokens = plain_patches or number in wanted_blocks
        class_token_only = number == len(blocks) - 1 and visual.pool_type == "tok" and not all_tokens
        if number not in second:
            x = block_class_token(block, x) if class_token_only else block(x)
            if number in wanted_blocks:
                block_tokens[number] = x
            if number in wanted_vv_blocks:
                vv_block_tokens[number] = x if number < path.vv_blocks[0] else x_vv
            continue
        if number == path.vv_blocks[0]:
            x_vv = x
        q, k, v = _queries_keys_values(block, x, values_alone=last and path.attention == "vv")
        x_vv = _second_path_block(block, x_vv, {"vv": v, "qq": q, "kk": k}[path.attention], v, path)
        if number in wanted_vv_blocks:
            vv_block_tokens[number] = x_vv
        if last:
            break
        if class_token_only:
            x, q = x[:, :1], q[:, :, :1]  # only the class token leaves the original path
        x = finish_block(block, x, q, k, v)
        if number in wanted_blocks:
            block_tokens[number] = x
    return _PathTokens(x, x_vv, block_tokens, vv_block_tokens)


def _queries_keys_values(
    block: ResidualAttentionBlock, x: Tensor, *, values_alone: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by heads; or the values in all three places."""
    normed = block.ln_1(x)
    if values_alone:
        (v,) = split_heads(block, project_in(block, normed, VALUES))
        return v, v, v
    q, k, v = split_heads(block, project_in(block, normed))
    return q, k, v


def _second_path_block(
    block: ResidualAttentionBlock, x_vv: Tensor, alike: Tensor, v: Tensor, path: AttentionPath
) -> Tensor:
    """The second path's tokens after a block: attention with the same as queries and keys, added."""
    x_vv = x_vv + block.ls_1(attend(block, alike, alike, v, v.shape[-1] ** -0.5 / path.temperature))
    if path.feed_forward:
        x_vv = x_vv + block.ls_2(block.mlp(block.ln_2(x_vv)))
    return x_vv


def embed(visual: VisionTransformer, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B T W"]:
    """Tokens that enter block 0: class token, then patches row by row."""
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    embedded: Tensor = visual.ln_pre(visual.patch_dropout(tokens))
    return embedded


def pool(visual: VisionTransformer, x: Float[Tensor, "B T W"], *, ln_post: bool = True) -> Float[Tensor, "B D"]:
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
