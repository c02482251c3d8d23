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

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.scorers.dual.scorer import text_scores, visual_scores
from zsad.scorers.interface import NO_OTHER_NORMAL, CategoryFeatures, Scored
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
    memory = _Memory(category_features.shots, settings, device) if settings.shots else None
    for number in range(len(store)):
        classes = text_scores(store.class_tokens(number).to(device), text, settings.tau)
        scales = [classes[:, None, None].expand(-1, store.grid, store.grid)]
        for side in settings.windows:
            windows = store.output(number, f"window-{side}").to(device)
            scales.append(window_map(text_scores(windows, text, settings.tau), store.grid, side))
        patches, image = harmonic_mean(torch.stack(scales)), float(classes.double().mean())
        if memory is not None:
            if not memory.others(store.digests[number]):
                yield Scored.without_score(number, NO_OTHER_NORMAL)
                continue
            few = memory.map(store, number)
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


def association(tokens: Float[Tensor, "C n d"], memory: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, "C n"]:
    """Return the distance of each token from the memory: the minimum of (1 - cos) / 2 over its tokens, 0..1 (eq. 4).

    `memory` has the tokens of each normal image. All tokens are L2-normalised.
    """
    distances = visual_scores(tokens.flatten(0, 1), memory) / 2
    # rounding can make the distance of equal tokens negative; its inverse would be large with the wrong sign
    return distances.clamp_min(0).reshape(tokens.shape[:2])


class _Memory:
    """Memory of all tokens of all normal images, by scale."""

    def __init__(self, shots: FeatureStore | None, settings: WinClip, device: torch.device) -> None:
        if shots is None:
            raise ValueError("few-shot WinCLIP needs normal images")
        if not len(shots):
            raise InputError(shots.folder, f"contains no image; {settings.title} needs at least one normal image")
        self._windows, self._patches, self._device = settings.windows, settings.patch_output, device
        self._digests = shots.digests
        self._tokens = {
            name: [self._read(shots, number, name).flatten(0, 1) for number in range(len(shots))]
            for name in settings.outputs
        }

    def others(self, digest: str) -> list[int]:
        """Return the numbers of the normal images that are not this image."""
        return [number for number, known in enumerate(self._digests) if known != digest]

    def map(self, store: FeatureStore, number: int) -> Float32[Tensor, "C g g"]:
        """Return the mean of eq. 4's scores over {image, each window size}."""
        scales = [self._association(store, number, self._patches).reshape(-1, store.grid, store.grid)]
        for side in self._windows:
            scales.append(window_map(self._association(store, number, f"window-{side}"), store.grid, side))
        return torch.stack(scales).mean(0)

    def _association(self, store: FeatureStore, number: int, name: str) -> Float32[Tensor, "C n"]:
        memory = [self._tokens[name][other] for other in self.others(store.digests[number])]
        return association(self._read(store, number, name), memory)

    def _read(self, store: FeatureStore, number: int, name: str) -> Float32[Tensor, "C n d"]:
        return functional.normalize(store.output(number, name).to(self._device), dim=-1)
