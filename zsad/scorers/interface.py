"""Input and output of every system: its function `score(category_features, settings)` yields one result per image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray
from torch import Tensor

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.config.run import EncoderSettings


@dataclass(frozen=True)
class CategoryFeatures:
    """Features of one category, and everything else that a system needs to score it.

    Attributes
    ----------
    store
        Features of the images, with the outputs that the system's settings name. Images are identified by their
        number in it.
    text
        Normal and anomalous text features, L2-normalised. None: the system reads no text features.
    drawn
        For each image the numbers of the other images drawn for it.
    shots
        Features of normal images of the category. None: the system uses no normal images.
    paths
        Image files, by number.
    category
        Name of the category, for prompts that a system makes itself.
    encoder
        Settings of the model that made the features.
    checkpoint
        File of the system's trained weights. None: the system is not trained.
    seed
        Seed of all random choices of the system.
    device
        Device to compute on.
    batch_size
        Largest number of images per batch.
    report
        Function that a system calls with the number of finished images, if it yields all of them at the end.
    """

    store: FeatureStore
    text: Float32[Tensor, "2 D"] | None
    references: Int64[ndarray, "n k"]
    shots: FeatureStore | None
    paths: tuple[Path, ...]
    category: str
    encoder: EncoderSettings
    checkpoint: Path | None
    seed: int
    device: torch.device
    batch_size: int
    report: Callable[[int], None] = lambda done: None

    @property
    def text_on_device(self) -> Float32[Tensor, "2 D"]:
        """Return `text` on the device.

        Raises
        ------
        InputError
            `text` has another dimension than the features.
        """
        if self.text is None:
            raise ValueError("this system needs text features")
        if self.text.shape != (2, self.store.dim):
            rule = f"features of {self.store.dim} numbers do not fit text features of shape {tuple(self.text.shape)}"
            raise InputError(self.store.folder, rule)
        return self.text.to(self.device)


NO_OTHER_NORMAL = "the only normal image has no other to be compared with"
"""Reason why the only normal image has no score."""


def mean_of_top(values: Float[Tensor, "*places"], share: float) -> float:
    """Return the mean of the largest `share` (0..1) of the values. Their number is rounded down, but at least one."""
    flat = values.flatten()
    # 1e-9: a product such as 0.29 * 100 is slightly below the whole number because of rounding
    count = max(1, math.floor(share * len(flat) + 1e-9))
    return float(flat.topk(count).values.double().mean())


def top_score(distances: Float[Tensor, "*places"], share: float, *, subtract_median: bool) -> float:
    """Return an image's score from its patches' distances: `mean_of_top`, relative to their median if wished."""
    if subtract_median:
        distances = distances - distances.median()
    return mean_of_top(distances, share)


@dataclass(frozen=True)
class Scored:
    """Scores of one image; higher is more anomalous.

    Attributes
    ----------
    number
        Number of the image in `CategoryFeatures.store`.
    score
        Score of the image.
    map
        Scores of the patches, or pixels, of each crop. The side g is the same for all images.
    problem
        Reason in a few words why the image has no score, for example because its file is gone. None: it has one.
    """

    number: int
    score: float
    map: Float32[Tensor, "C g g"]
    problem: str | None = None

    @classmethod
    def without_score(cls, number: int, problem: str) -> Scored:
        """Return the result of an image that could not be scored. The others are scored."""
        return cls(number, 0.0, torch.zeros(0, 1, 1), problem)
