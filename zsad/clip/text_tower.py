"""The frozen text tower from word embeddings on, with learned tokens in its layers (001, section 3.3, eq. 3).

A plain function over an open_clip tower's own modules, for CLIP and CustomTextCLIP alike: nothing is patched or copied.
Without learned parts it is the model's `encode_text`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from open_clip import CustomTextCLIP
from torch import Tensor, nn

END_POOLING = ("argmax", "eos")
"""open_clip's two ways to find the end-of-text token."""


def tower_of(model: nn.Module) -> Any:
    """The module that has the text tower's parts: the model itself, or its `text`."""
    return model.text if isinstance(model, CustomTextCLIP) else model


def unsupported_reason(model: nn.Module) -> str | None:
    """Why this model's text tower cannot take learned tokens, in a few words; None if it can."""
    tower = tower_of(model)
    if not hasattr(tower, "token_embedding") or not hasattr(tower, "ln_final"):
        return f"its text tower is a {type(tower).__name__}, not open_clip's own transformer"
    if getattr(tower, "cls_emb", None) is not None or tower.attn_mask is None:
        return "its text tower is not CLIP's causal one"
    if _pooling(tower) not in END_POOLING or tower.text_projection is None:
        return "its text tower does not pool at the end-of-text token, or does not project"
    return None


def layers(model: nn.Module) -> int:
    """Layers M of the text tower."""
    return len(tower_of(model).transformer.resblocks)


def width(model: nn.Module) -> int:
    """Dimension of word embeddings."""
    return int(tower_of(model).ln_final.weight.shape[0])


def end_of_text(model: nn.Module, ids: Int64[Tensor, "B T"]) -> Int64[Tensor, " B"]:
    """Where the token stands at which the tower pools."""
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
    """Text features, not normalised; differentiable in `embedded` and `deep`.

    Eq. 3 with m = 2..L+1: what layer m-1 gave in the places of q_m is discarded, and q_m takes its place before
    layer m. *Reading:* the places of t^1..t^Q are those after the start-of-text token, which is none of the prompt's;
    eq. 3's last line leaves layer M' without new tokens, the text ("until we reach the designated layer M'") and the
    public code (eight sets for M' = 9) do not, and so L = M' - 1.

    Parameters
    ----------
    model
        Without `unsupported_reason`; used as it is, in its own mode and dtype.
    embedded
        Word embeddings without positions, start-of-text first. T may be less than the tower's context: what comes
        after the end is never looked at.
    end
        From `end_of_text`.
    deep
        Learned tokens q_2..q_(L+1), one set for all prompts; L + 1 is at most the tower's number of layers.
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
