"""CLIP and CLIP-AC: the class token is compared with the two texts for the image score, and patches for the map.

The patches are those of the original attention path. The two systems differ only in their prompts. CLIP (Radford et
al. 2021) has one plain normal and one plain anomalous prompt. CLIP-AC (Jeong et al., WinCLIP, table 1) has the mean
over WinCLIP's ensemble. Both are baselines in the AnomalyCLIP paper (Zhou et al., ICLR 2024). CLIP is also a baseline
in the dual-image paper (Zhang et al., Dual-Image Enhanced CLIP, 2024).
"""

from __future__ import annotations

from collections.abc import Iterator

from zsad.scorers.clip.settings import Clip, ClipAc
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import CategoryFeatures, Scored


def score(category_features: CategoryFeatures, settings: Clip | ClipAc) -> Iterator[Scored]:
    """Score all images of a category in order. No image affects the scores of another.

    Image score and map are the softmax share of the anomalous text at `tau` (dual-image paper, eq. 1-3), 0..1.
    Higher is more anomalous. The image score is the mean over crops.

    Parameters
    ----------
    category_features
        Features of the category, with text and with the output `plain`.
    settings
        `tau`.

    Raises
    ------
    InputError
        The features are damaged or lack the output `plain`.
    """
    store, device = category_features.store, category_features.device
    text = category_features.text_on_device
    for number in range(len(store)):
        classes = text_scores(store.class_tokens(number).to(device), text, settings.tau)
        patches = text_scores(store.output(number, "plain").to(device), text, settings.tau)
        yield Scored(number, float(classes.double().mean()), patches.reshape(-1, store.grid, store.grid))
