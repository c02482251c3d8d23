"""Dual-image enhanced CLIP (002): what the text says, what another image says, and their fusion (eq. 1-6, 12, 13)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray
from torch import Tensor

from zsad.config.run import ScoreSettings, Variant

Aggregate = Literal["min", "mean", "median"]
Part = Literal["class", "a_l", "a_v", "a_t", "a_t_text"]
"""A_cls of the text, and the maps of the text, of the references, and of the adapter (with and without references)."""

PARTS: dict[Variant, tuple[Part, ...]] = {
    "text": ("class", "a_l"),
    "text_tta": ("class", "a_l", "a_t_text"),
    "visual": ("a_v",),
    "joint": ("class", "a_l", "a_v"),
    "joint_tta": ("class", "a_l", "a_v", "a_t"),
}
"""What each variant is computed from."""
MAX_COSINES = 1 << 24
"""Cosines held at a time: 64 MiB, however many crops the images have."""


def text_scores(tokens: Float[Tensor, "*S D"], text: Float[Tensor, "2 D"], tau: float) -> Float[Tensor, "*S"]:
    """F of eq. 1-3: the softmax share of the anomalous text, 0..1.

    Parameters
    ----------
    tokens
        Class or patch tokens, L2-normalised.
    text
        Normal and anomalous text features in this order, L2-normalised.
    tau
        Temperature.
    """
    # of two terms the softmax is the logistic function of their difference, which cannot overflow
    return torch.sigmoid(tokens @ (text[1] - text[0]) / tau)


def visual_scores(
    query: Float[Tensor, "N D"], references: Sequence[Float[Tensor, "_ D"]], aggregate: Aggregate = "min"
) -> Float[Tensor, " N"]:
    """Eq. 5: how far each patch is from the most similar patch of a reference, 1 - cos, 0..2.

    Over several references the minimum (one memory of all their patches), the mean or the median (of an even number:
    the mean of the middle two) is taken.

    Parameters
    ----------
    query
        Patches of all crops of the query image, L2-normalised.
    references
        The same of each reference, which may have another number of crops; at least one.
    aggregate
        How the references' distances become one.
    """
    distances = torch.stack([1 - _highest_cosine(query, reference) for reference in references])
    if aggregate == "min":
        return distances.amin(0)
    return distances.mean(0) if aggregate == "mean" else distances.quantile(0.5, dim=0)


def _highest_cosine(query: Float[Tensor, "N D"], reference: Float[Tensor, "M D"]) -> Float[Tensor, " N"]:
    rows = max(1, MAX_COSINES // len(reference))
    return torch.cat([(part @ reference.T).amax(1) for part in torch.split(query, rows)])


def draw_references(digests: Sequence[str], seed: int, count: int) -> Int64[ndarray, "n k"]:
    """For each image, the rows of `count` random other images; fewer where there are fewer others.

    What is drawn depends on the seed and on which contents there are, not on their order. A larger count keeps the
    references of a smaller one and adds to them. Files of equal content are one image: none is another's reference,
    and all have the same.

    Parameters
    ----------
    digests
        sha256 of each image, by row.
    seed
        Other seeds pair images otherwise.
    count
        References wanted an image, k of figure 5a.
    """
    first_row = {digest: row for row, digest in reversed(list(enumerate(digests)))}
    distinct = sorted(first_row)
    rank = {digest: place for place, digest in enumerate(distinct)}
    k = min(count, max(len(distinct) - 1, 0))
    drawn = np.empty((len(digests), k), dtype=np.int64)
    for row, digest in enumerate(digests):
        own = rank[digest]
        entropy = hashlib.sha256(f"references {seed} {digest}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(entropy[:16], "big"))
        for place, other in enumerate(_distinct_integers(rng, len(distinct) - 1, k)):
            # numbers 0..n-2 stand for all images but this one
            drawn[row, place] = first_row[distinct[other + (other >= own)]]
    return drawn


def _distinct_integers(rng: np.random.Generator, below: int, count: int) -> list[int]:
    """The first `count` steps of a Fisher-Yates shuffle of 0..below-1, without the rest of it."""
    moved: dict[int, int] = {}
    taken = []
    for step in range(count):
        at = int(rng.integers(step, below))
        taken.append(moved.get(at, at))
        moved[at] = moved.get(step, step)
    return taken


@dataclass(frozen=True)
class Evidence:
    """The scores of one image that variants are fused from; None where no variant asked for it.

    Attributes
    ----------
    class_text
        Eq. 1 for each crop, 0..1.
    a_l, a_v, a_t, a_t_text
        Patch maps: of the text (eq. 3), of the references (eq. 5), of the adapter (eq. 9), and of the adapter that had
        no references to be consistent with.
    """

    class_text: Float32[ndarray, " C"] | None = None
    a_l: Float32[ndarray, "C N"] | None = None
    a_v: Float32[ndarray, "C N"] | None = None
    a_t: Float32[ndarray, "C N"] | None = None
    a_t_text: Float32[ndarray, "C N"] | None = None


def fuse_map(evidence: Evidence, variant: Variant, settings: ScoreSettings) -> Float32[ndarray, "C N"]:
    """Patch map of a variant: eq. 12 for `joint_tta`, eq. 6 for `joint`; higher is more anomalous.

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
    """Score of an image: eq. 13 for `joint_tta`; higher is more anomalous.

    The class token's score is the mean over crops, a map's the maximum over all crops' patches.

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
