"""Forward pass of a CLIP vision transformer with two attention paths.

The two paths are those of the dual-image paper (Zhang et al., Dual-Image Enhanced CLIP, 2024; section 3.1, eq. 4).
The original path gives the class token, the second path (V-V attention) gives the patch tokens. Both paths share each
block's LayerNorm and value projection. The second path therefore costs only one attention and one output projection per
block. The code consists of plain functions over the public modules of an open_clip tower, which is not changed or
copied. `tower_outputs` also returns what other systems read from the same pass: the original path's patches and the
tokens after each block.
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
"""Vectors that the second path uses as both queries and keys: values, queries or keys (DPAM in AnomalyCLIP)."""


@dataclass(frozen=True)
class AttentionPath:
    """Settings of the second attention path.

    Parameters
    ----------
    vv_blocks
        Numbers of the blocks on the second path, from 0, rising; at least one.
    feed_forward
        Whether the blocks' feed-forward layers also run on the second path. In the paper they do not.
    temperature
        Divisor of the logits of V-V attention, in addition to sqrt(head width). With a low value each token attends
        only to itself.
    class_ln_post
        Whether the last LayerNorm is applied to the class token before the projection, as in CLIP.
    attention
        Vectors used as both queries and keys. The values are always those of the block.
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
    """Return in a few words why a tower cannot have the second path. None: it can."""
    if not isinstance(visual, VisionTransformer):
        return f"its image tower is a {type(visual).__name__}, not open_clip's own vision transformer"
    if visual.attn_pool is not None or visual.pool_type == "none":
        return "its image tower pools by attention, so that patches are not in the joint space"
    if not all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks):
        return "its image tower has custom attention blocks"
    height, width = visual.grid_size
    return None if height == width else f"its image tower has {height} x {width} patches, not a square"


def two_path(
    visual: VisionTransformer, images: Float[Tensor, "B 3 S S"], path: AttentionPath
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B N D"]]:
    """Run both paths in one forward pass, which is differentiable.

    Let `x_l` be the tokens that enter block `l` of the original path, `f` the first V-V block, and `VV_l` the attention
    of block `l` with the values as queries and keys. Without feed-forward, `x_vv = x_f + sum_l VV_l(LN1_l(x_l))`. The
    last LayerNorm and the projection follow, as for the class token.

    Parameters
    ----------
    visual
        Tower for which `unsupported_reason` returns None. Its mode and dtype are not changed.
    images
        Images, normalised by the model's mean and standard deviation.
    path
        Settings of the second path.

    Returns
    -------
    tuple
        The class token and the N patch tokens (row by row), in the joint space of dimension D and not normalised. The
        class token equals `visual(images)` if `class_ln_post` is set.

    Raises
    ------
    ValueError
        The tower lacks a V-V block.
    """
    found = _run_paths(visual, images, path)
    return pool(visual, found.x, ln_post=path.class_ln_post), _project(visual, found.x_vv[:, 1:])


@dataclass(frozen=True)
class TowerOutputs:
    """Outputs of one forward pass. None of them is L2-normalised.

    Attributes
    ----------
    class_token
        Class token, as from `two_path`.
    patches
        Patches of the second path, as from `two_path`. None: not requested.
    last_tokens
        Patches of the original path after the last LayerNorm, in the tower's width. None: not requested.
    plain_patches
        `last_tokens` after the projection, in the joint space. None: not requested.
    blocks
        Tokens after each requested block, class token first, in the tower's width, by block number from 0.
    vv_patches
        Patches of the second path after each requested block, in the joint space, by block number from 0.
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
    """Run both paths and return the requested outputs. Blocks are numbered from 0.

    Only those blocks of the second path are computed that the requested outputs need. Raises ValueError if the tower
    lacks a requested block.
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
    """Return only the patch tokens of `two_path`. The original path stops at the values of the last V-V block."""
    return _project(visual, _run_paths(visual, images, path, patches_only=True).x_vv[:, 1:])


@dataclass(frozen=True)
class _PathTokens:
    """Tokens of both paths."""

    x: Tensor
    """Tokens of the original path after all blocks. Only the class token if the other tokens are not needed."""
    x_vv: Tensor
    """Tokens of the second path after the last block that was computed."""
    blocks: dict[int, Tensor]
    """Tokens of the original path after each requested block."""
    vv_blocks: dict[int, Tensor]
    """Tokens of the second path after each requested block."""


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
    """Run both paths through the blocks. What no requested output needs is not computed."""
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
            x, q = x[:, :1], q[:, :, :1]
        x = finish_block(block, x, q, k, v)
        if number in wanted_blocks:
            block_tokens[number] = x
    return _PathTokens(x, x_vv, block_tokens, vv_block_tokens)


def _queries_keys_values(
    block: ResidualAttentionBlock, x: Tensor, *, values_alone: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values by heads. With `values_alone`, all three are the values."""
    normed = block.ln_1(x)
    if values_alone:
        (v,) = split_heads(block, project_in(block, normed, VALUES))
        return v, v, v
    q, k, v = split_heads(block, project_in(block, normed))
    return q, k, v


def _second_path_block(
    block: ResidualAttentionBlock, x_vv: Tensor, alike: Tensor, v: Tensor, path: AttentionPath
) -> Tensor:
    """Return the second path's tokens after a block. `alike` are the vectors used as both queries and keys."""
    x_vv = x_vv + block.ls_1(attend(block, alike, alike, v, v.shape[-1] ** -0.5 / path.temperature))
    if path.feed_forward:
        x_vv = x_vv + block.ls_2(block.mlp(block.ln_2(x_vv)))
    return x_vv


def embed(visual: VisionTransformer, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B T W"]:
    """Return the tokens that enter block 0: the class token, then the patches row by row."""
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    embedded: Tensor = visual.ln_pre(visual.patch_dropout(tokens))
    return embedded


def pool(visual: VisionTransformer, x: Float[Tensor, "B T W"], *, ln_post: bool = True) -> Float[Tensor, "B D"]:
    """Return the image's token in the joint space, pooled as the tower does."""
    normalise = visual.ln_post if ln_post else torch.nn.Identity()
    if visual.pool_type == "tok":
        pooled = normalise(
            x[:, 0]
        )  # LayerNorm acts on each token separately, so selecting the token first is equivalent
    elif visual.final_ln_after_pool:
        pooled = normalise(x[:, 1:].mean(dim=1))
    else:
        pooled = normalise(x)[:, 1:].mean(dim=1)
    joint: Tensor = pooled @ visual.proj
    return joint


def _project(visual: VisionTransformer, patches: Tensor) -> Tensor:
    joint: Tensor = visual.ln_post(patches) @ visual.proj
    return joint
