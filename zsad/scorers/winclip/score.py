"""WinCLIP and WinCLIP+ (Jeong et al., CVPR 2023): windows of patches are compared with texts and with normal images.

Equation numbers are those of the paper. Eq. 1 scores a token by text. Eq. 4 scores it by a memory of normal tokens
(reference association). The paper leaves some points open; this is what the code does:

| point | here |
|---|---|
| scores of 0 in a harmonic mean | the mean is 0, its limit |
| the scale "whole image" among the few-shot maps | patches of the last block, not projected; see `memory_ln_post` |
| several crops of one image | each crop has its own maps; class scores are averaged, the maximum is over all crops |
| several crops of a normal image | all are in the memory |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from zsad.clip.feature_store import FeatureStore
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import NO_OTHER_NORMAL, CategoryFeatures, Scored
from zsad.scorers.memory import Memory, distances_to, has_others, read_memory
from zsad.scorers.winclip.settings import WinClip


def score(category_features: CategoryFeatures, settings: WinClip) -> Iterator[Scored]:
    """Score all images of a category in order. No image affects the scores of another.

    A normal image that is scored itself is not part of its own memory.
    Zero-shot, the image score is the class token's score. The map is the harmonic mean over {image, each window size}.
    With normal images, the map is the mean of the zero-shot map and the memory's map. The image score is the mean of
    the class token's score and the maximum of the memory's map. All scores are 0..1; higher is more anomalous.

    Parameters
    ----------
    category_features
        Features of the category, with text and the outputs `settings.outputs`. If `settings.shots` is above 0,
        `shots` must have these outputs too.
    settings
        `tau`, `windows`, and `shots`. If `shots` is above 0, the memory contains all of `category_features.shots`.

    Raises
    ------
    InputError
        The features are damaged or lack an output, or `category_features.shots` contains no image.
    """
    store, device = category_features.store, category_features.device
    text = category_features.text_on_device
    shots, title = category_features.shots, settings.title
    memories = {one: read_memory(shots, one, title, device) for one in settings.outputs} if settings.shots else None
    for number in range(len(store)):
        classes = text_scores(store.class_tokens(number).to(device), text, settings.tau)
        scales = [classes[:, None, None].expand(-1, store.grid, store.grid)]
        for side in settings.windows:
            windows = store.output(number, f"window-{side}").to(device)
            scales.append(window_map(text_scores(windows, text, settings.tau), store.grid, side))
        patches, image = harmonic_mean(torch.stack(scales)), float(classes.double().mean())
        if memories is not None:
            if not has_others(memories[settings.patch_output], store.digests[number]):
                yield Scored.without_score(number, NO_OTHER_NORMAL)
                continue
            few = _memory_map(memories, store, number, settings, device)
            patches, image = (patches + few) / 2, (image + float(few.max())) / 2
        yield Scored(number, image, patches)


def window_map(scores: Float[Tensor, "C n"], grid: int, side: int) -> Float[Tensor, "C g g"]:
    """Return for each patch the harmonic mean over the windows that cover it (harmonic aggregation).

    Parameters
    ----------
    scores
        Scores of the windows of side x side patches, in the order of `zsad.clip.windows.window_patches`; at least 0.
    grid
        Number g of patches per side of a crop.
    side
        Side of a window, in patches.
    """

    def over_patches(values: Float[Tensor, "C n"]) -> Float[Tensor, "C 1 g g"]:
        """Return for each patch the sum over the windows that cover it."""
        return functional.fold(values[:, None].expand(-1, side**2, -1), (grid, grid), side)

    # 1/0 is infinite, and so is each sum that contains it: the mean becomes 0
    return (over_patches(torch.ones_like(scores[:1])) / over_patches(1 / scores))[:, 0]


def harmonic_mean(scores: Float[Tensor, "k C g g"]) -> Float[Tensor, "C g g"]:
    """Return the harmonic mean over the scales. Scores must not be negative; a score of 0 makes the mean 0."""
    return len(scores) / (1 / scores).sum(0)


def association(tokens: Float[Tensor, "C n d"], memory: Memory, digest: str) -> Float[Tensor, "C n"]:
    """Return the distance of each token from the memory: the minimum of (1 - cos) / 2 over its tokens, 0..1 (eq. 4).

    The image `digest` itself is left out of the memory; another one must be in it.
    """
    return distances_to(memory, tokens, digest) / 2


def _memory_map(
    memories: Mapping[str, Memory], store: FeatureStore, number: int, settings: WinClip, device: torch.device
) -> Float32[Tensor, "C g g"]:
    """Return the mean of eq. 4's scores over {image, each window size}."""

    def scores(name: str) -> Float[Tensor, "C n"]:
        return association(store.output(number, name).to(device), memories[name], store.digests[number])

    windows = [window_map(scores(f"window-{side}"), store.grid, side) for side in settings.windows]
    return torch.stack([scores(settings.patch_output).reshape(-1, store.grid, store.grid), *windows]).mean(0)
