"""Dual-image enhanced CLIP: scores by text, scores by reference images, and their fusion (eq. 1-6, 12, 13).

Equations and figures are those of the dual-image paper (Zhang et al., Dual-Image Enhanced CLIP, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy import ndarray
from torch import Tensor

from zsad.config.run import ScoreSettings, Variant

Aggregate = Literal["min", "mean", "median"]
Part = Literal["class", "a_l", "a_v", "a_t", "a_t_text"]
"""Parts of a score: `class` is A_cls of the text, the others are maps.

`a_l` is the map of the text and `a_v` that of the references. `a_t` and `a_t_text` are the maps of the adapter, with
and without references.
"""

PARTS: dict[Variant, tuple[Part, ...]] = {
    "text": ("class", "a_l"),
    "text_tta": ("class", "a_l", "a_t_text"),
    "visual": ("a_v",),
    "joint": ("class", "a_l", "a_v"),
    "joint_tta": ("class", "a_l", "a_v", "a_t"),
}
"""Parts from which each variant is computed."""
MAX_COSINES = 1 << 24
"""Largest number of cosines in memory at a time: 64 MiB for images with any number of crops."""


def text_scores(tokens: Float[Tensor, "*S D"], text: Float[Tensor, "2 D"], tau: float) -> Float[Tensor, "*S"]:
    """Return F of eq. 1-3: the softmax share of the anomalous text, 0..1.

    Parameters
    ----------
    tokens
        Class or patch tokens, L2-normalised.
    text
        Normal and anomalous text features in this order, L2-normalised.
    tau
        Temperature.
    """
    # the softmax of two terms is the logistic function of their difference, which cannot overflow
    return torch.sigmoid(tokens @ (text[1] - text[0]) / tau)


def visual_scores(
    query: Float[Tensor, "N D"], references: Sequence[Float[Tensor, "_ D"]], aggregate: Aggregate = "min"
) -> Float[Tensor, " N"]:
    """Return the distance 1 - cos of each patch to the most similar patch of a reference, 0..2 (eq. 5).

    With several references, their distances are combined. The minimum treats the patches of all references as one
    memory. The median of an even number is the mean of the middle two.

    Parameters
    ----------
    query
        Patches of all crops of the query image, L2-normalised.
    references
        Patches of each reference, L2-normalised; at least one reference. The number of crops may differ.
    aggregate
        Rule that combines the distances to the references.
    """
    distances = torch.stack([1 - _highest_cosine(query, reference) for reference in references])
    if aggregate == "min":
        return distances.amin(0)
    return distances.mean(0) if aggregate == "mean" else distances.quantile(0.5, dim=0)


def _highest_cosine(query: Float[Tensor, "N D"], reference: Float[Tensor, "M D"]) -> Float[Tensor, " N"]:
    rows = max(1, MAX_COSINES // len(reference))
    return torch.cat([(part @ reference.T).amax(1) for part in torch.split(query, rows)])


@dataclass(frozen=True)
class Evidence:
    """Scores of one image from which variants are fused. A part is None if no variant needs it.

    Attributes
    ----------
    class_text
        Score of eq. 1 for each crop, 0..1.
    a_l
        Patch map of the text (eq. 3).
    a_v
        Patch map of the references (eq. 5).
    a_t
        Patch map of the adapter (eq. 9).
    a_t_text
        Patch map of the adapter trained without references.
    """

    class_text: Float32[ndarray, " C"] | None = None
    a_l: Float32[ndarray, "C N"] | None = None
    a_v: Float32[ndarray, "C N"] | None = None
    a_t: Float32[ndarray, "C N"] | None = None
    a_t_text: Float32[ndarray, "C N"] | None = None


def fuse_map(evidence: Evidence, variant: Variant, settings: ScoreSettings) -> Float32[ndarray, "C N"]:
    """Return the patch map of a variant: eq. 12 for `joint_tta`, eq. 6 for `joint`. Higher is more anomalous.

    | variant | map |
    |---|---|
    | text | A_L |
    | text_tta | lambda_2 A_T |
    | visual | A_V |
    | joint | lambda_1 A_V + lambda_text A_L |
    | joint_tta | lambda_1 A_V + lambda_2 A_T |
    """
    match variant:
        case "text":
            return _require_part(evidence.a_l)
        case "text_tta":
            return np.float32(settings.lambda_2) * _require_part(evidence.a_t_text)
        case "visual":
            return _require_part(evidence.a_v)
        case "joint":
            text = np.float32(settings.lambda_text) * _require_part(evidence.a_l)
            return np.float32(settings.lambda_1) * _require_part(evidence.a_v) + text
        case "joint_tta":
            adapted = np.float32(settings.lambda_2) * _require_part(evidence.a_t)
            return np.float32(settings.lambda_1) * _require_part(evidence.a_v) + adapted


def fuse_image(evidence: Evidence, variant: Variant, settings: ScoreSettings) -> float:
    """Return the score of an image: eq. 13 for `joint_tta`. Higher is more anomalous.

    A_L_cls is the mean over crops. The maximum of a map is taken over the patches of all crops.

    | variant | score |
    |---|---|
    | text | A_L_cls |
    | text_tta | lambda_3 A_L_cls + lambda_5 max A_T |
    | visual | max A_V |
    | joint | lambda_3 A_L_cls + lambda_4 max A_V + lambda_5 max A_L |
    | joint_tta | lambda_3 A_L_cls + lambda_4 max A_V + lambda_5 max A_T |
    """
    match variant:
        case "text":
            return _class_score(evidence)
        case "text_tta":
            return settings.lambda_3 * _class_score(evidence) + settings.lambda_5 * _maximum(evidence.a_t_text)
        case "visual":
            return _maximum(evidence.a_v)
        case "joint" | "joint_tta":
            last = evidence.a_l if variant == "joint" else evidence.a_t
            visual = settings.lambda_4 * _maximum(evidence.a_v)
            return settings.lambda_3 * _class_score(evidence) + visual + settings.lambda_5 * _maximum(last)


def _require_part(part: ndarray | None) -> ndarray:
    if part is None:
        raise ValueError("this variant was not scored")
    return part


def _class_score(evidence: Evidence) -> float:
    return float(_require_part(evidence.class_text).mean(dtype=np.float64))


def _maximum(part: ndarray | None) -> float:
    return float(_require_part(part).max())
