"""Run the frozen text tower on word embeddings, with learned tokens in its layers.

The learned tokens are those of AnomalyCLIP (Zhou et al., ICLR 2024; section 3.3, eq. 3).
These are plain functions over the modules of an open_clip tower (CLIP or CustomTextCLIP), which is not changed or
copied. Without learned tokens the result is that of the model's `encode_text`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from open_clip import CustomTextCLIP
from torch import Tensor, nn

END_POOLING = ("argmax", "eos")
"""Pooling types of open_clip that use the end-of-text token."""


def tower_of(model: nn.Module) -> Any:
    """Return the module with the parts of the text tower: the model or its attribute `text`."""
    return model.text if isinstance(model, CustomTextCLIP) else model


def unsupported_reason(model: nn.Module) -> str | None:
    """Return in a few words why a model's text tower cannot take learned tokens. None: it can."""
    tower = tower_of(model)
    if not hasattr(tower, "token_embedding") or not hasattr(tower, "ln_final"):
        return f"its text tower is a {type(tower).__name__}, not open_clip's own transformer"
    if getattr(tower, "cls_emb", None) is not None or tower.attn_mask is None:
        return "its text tower is not CLIP's causal one"
    if _pooling(tower) not in END_POOLING or tower.text_projection is None:
        return "its text tower does not pool at the end-of-text token, or does not project"
    return None


def layers(model: nn.Module) -> int:
    """Return the number M of layers of the text tower."""
    return len(tower_of(model).transformer.resblocks)


def width(model: nn.Module) -> int:
    """Return the dimension of the word embeddings."""
    return int(tower_of(model).ln_final.weight.shape[0])


def end_of_text(model: nn.Module, ids: Int64[Tensor, "B T"]) -> Int64[Tensor, " B"]:
    """Return the position of the end-of-text token, at which the tower pools."""
    tower = tower_of(model)
    if _pooling(tower) == "argmax":
        return ids.argmax(dim=1)
    eos = getattr(tower, "text_eos_id", None) or tower.eos_id
    return torch.eq(ids, eos).int().argmax(dim=1)


def encode_embeddings(
    model: nn.Module,
    embedded: Float[Tensor, "B T W"],
    end: Int64[Tensor, " B"],
    deep: Float[Tensor, "L Q W"] | None = None,
) -> Float[Tensor, "B D"]:
    """Return text features, not normalised. The result is differentiable in `embedded` and `deep`.

    This is eq. 3 with m = 2..L+1. Before layer m, the learned tokens q_m replace the output of layer m-1 at their
    positions. The paper leaves two points open. Here the positions of t^1..t^Q are those after the start-of-text
    token. Layer M' also receives new tokens, so L = M' - 1. The last line of eq. 3 says otherwise, but the text does
    not ("until we reach the designated layer M'"), nor does the public code (eight sets for M' = 9).

    Parameters
    ----------
    model
        Model for which `unsupported_reason` returns None. Its mode and dtype are not changed.
    embedded
        Word embeddings without positions, start-of-text first. T may be smaller than the tower's context length,
        because tokens after the end have no effect.
    end
        Positions from `end_of_text`.
    deep
        Learned tokens q_2..q_(L+1), the same for all prompts. L + 1 is at most the number of layers.
    """
    tower = tower_of(model)
    length, count = embedded.shape[1], 0 if deep is None else len(deep)
    x = embedded + tower.positional_embedding[:length]
    mask = tower.attn_mask[:length, :length]
    for number, block in enumerate(tower.transformer.resblocks):
        if deep is not None and 1 <= number <= count:
            learned = deep[number - 1].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], learned, x[:, 1 + learned.shape[1] :]], dim=1)
        x = block(x, attn_mask=mask)
    x = tower.ln_final(x)[torch.arange(len(x), device=x.device), end]
    projection = tower.text_projection
    features: Tensor = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return features


def _pooling(tower: Any) -> str:
    return str(getattr(tower, "text_pool_type", None) or tower.pool_type)
