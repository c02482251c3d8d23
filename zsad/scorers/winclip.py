"""WinCLIP and WinCLIP+ (Jeong et al., CVPR 2023): windows of patches against the texts, and against normal images.

Equations are the paper's: eq. 1 is a token's score by text, eq. 4 its score by a memory of normal tokens (reference
association). What it leaves open:

| point | here |
|---|---|
| scores of 0 in a harmonic mean | the mean is 0, its limit |
| scale of the whole image among the few-shot maps | patch tokens of the last block after its LayerNorm, unprojected |
| several crops of one image | each has maps of its own; class scores are averaged, the maximum is over all crops |
| several crops of a normal image | all are in the memory |
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.config.systems import WinClip
from zsad.scorers.dual.scorer import text_scores, visual_scores
from zsad.scorers.interface import CategoryFeatures, Scored


def score(category_features: CategoryFeatures, settings: WinClip) -> Iterator[Scored]:
    """Score every image of a category, in order, each by itself.

    Zero-shot, the image's score is the class token's, and the map the harmonic mean over {image, each window size}.
    With normal images, the map is the mean of that and of the memory's map, and the image's score the mean of the class
    token's and of the memory's map's maximum. All are 0..1; higher is more anomalous.

    Parameters
    ----------
    category_features
        With text and the outputs `settings.outputs`; unless `settings.shots` is 0, `shots` has those outputs too.
    settings
        `tau`, `windows`, and whether there is a memory; it holds all of `category_features.shots`, however many.

    Raises
    ------
    InputError
        The features are damaged or were made without an output, or no normal image is in `category_features.shots`.
    """
    store, device = category_features.store, category_features.device
    text = category_features.text_on_device
    memory = _Memory(category_features.shots, settings, device) if settings.shots else None
    for number in range(len(store)):
        classes = text_scores(store.class_tokens(number).to(device), text, settings.tau)
        scales = [classes[:, None, None].expand(-1, store.grid, store.grid)]
        for side in settings.windows:
            windows = store.view(number, f"window-{side}").to(device)
            scales.append(window_map(text_scores(windows, text, settings.tau), store.grid, side))
        patches, image = harmonic_mean(torch.stack(scales)), float(classes.double().mean())
        if memory is not None:
            few = memory.map(store, number)
            patches, image = (patches + few) / 2, (image + float(few.max())) / 2
        yield Scored(number, image, patches)


def window_map(scores: Float[Tensor, "C n"], grid: int, side: int) -> Float[Tensor, "C g g"]:
    """Each patch's harmonic mean over the windows that cover it (harmonic aggregation).

    Parameters
    ----------
    scores
        Of the windows of side x side patches, in the order of `zsad.clip.windows.window_patches`, not negative.
    grid
        g, patches a side.
    side
        Of a window, patches.
    """

    def over_patches(values: Float[Tensor, "C n"]) -> Float[Tensor, "C 1 g g"]:
        """The sum, for each patch, over the windows that cover it."""
        return functional.fold(values[:, None].expand(-1, side**2, -1), (grid, grid), side)

    # 1/0 is infinite and so is every sum with it, which makes a mean of 0
    return (over_patches(torch.ones_like(scores[:1])) / over_patches(1 / scores))[:, 0]


def harmonic_mean(scores: Float[Tensor, "k C g g"]) -> Float[Tensor, "C g g"]:
    """Over the scales, of scores that are not negative; one of 0 makes it 0."""
    return len(scores) / (1 / scores).sum(0)


def association(tokens: Float[Tensor, "C n d"], memory: Float[Tensor, "m d"]) -> Float[Tensor, "C n"]:
    """How far each token is from the memory: min over it of (1 - cos) / 2, 0..1 (eq. 4).

    Both L2-normalised.
    """
    distances = visual_scores(tokens.flatten(0, 1), [memory]) / 2
    # of equal tokens rounding can make it negative, and its inverse then a large number of the wrong sign
    return distances.clamp_min(0).reshape(tokens.shape[:2])


class _Memory:
    """All tokens of all normal images, by scale."""

    def __init__(self, shots: FeatureStore | None, settings: WinClip, device: torch.device) -> None:
        if shots is None:
            raise ValueError("few-shot WinCLIP was given no normal images")
        if not len(shots):
            raise InputError(shots.folder, f"{settings.title} needs a normal image to remember, and there is none")
        self._windows, self._device = settings.windows, device
        self._tokens = {
            name: torch.cat([self._read(shots, number, name).flatten(0, 1) for number in range(len(shots))])
            for name in settings.outputs
        }

    def map(self, store: FeatureStore, number: int) -> Float32[Tensor, "C g g"]:
        """The mean over {image, each window size} of eq. 4's scores."""
        scales = [self._association(store, number, "tokens").reshape(-1, store.grid, store.grid)]
        for side in self._windows:
            scales.append(window_map(self._association(store, number, f"window-{side}"), store.grid, side))
        return torch.stack(scales).mean(0)

    def _association(self, store: FeatureStore, number: int, name: str) -> Float32[Tensor, "C n"]:
        return association(self._read(store, number, name), self._tokens[name])

    def _read(self, store: FeatureStore, number: int, name: str) -> Float32[Tensor, "C n d"]:
        return functional.normalize(store.view(number, name).to(self._device), dim=-1)
