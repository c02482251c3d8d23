"""CLIP and CLIP-AC: the class token against the two texts for the image, the original path's patches for the map.

The two differ in their prompts alone: one plain prompt a side (CLIP; Radford et al. 2021), or the mean over WinCLIP's
ensemble (CLIP-AC; Jeong et al., WinCLIP, table 1). Both are baselines of 001 and 002.
"""

from __future__ import annotations

from collections.abc import Iterator

from zsad.config.systems import Clip, ClipAc
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import CategoryFeatures, Scored


def score(category_features: CategoryFeatures, settings: Clip | ClipAc) -> Iterator[Scored]:
    """Score every image of a category, in order, each by itself.

    Both scores are the softmax share of the anomalous text at `tau` (002, eq. 1-3), 0..1; higher is more anomalous.
    The image's is the mean over its crops.

    Parameters
    ----------
    category_features
        With text, and with the output `plain`.
    settings
        `tau`.

    Raises
    ------
    InputError
        The features are damaged, or were made without the output.
    """
    store, device = category_features.store, category_features.device
    text = category_features.text_on_device
    for number in range(len(store)):
        classes = text_scores(store.class_tokens(number).to(device), text, settings.tau)
        patches = text_scores(store.view(number, "plain").to(device), text, settings.tau)
        yield Scored(number, float(classes.double().mean()), patches.reshape(-1, store.grid, store.grid))
