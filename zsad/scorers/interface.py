"""What every system reads, and what it gives: one function, `score(category_features, settings)`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from numpy import ndarray
from torch import Tensor

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.config.run import EncoderSettings


@dataclass(frozen=True)
class CategoryFeatures:
    """One category, ready to be scored.

    Attributes
    ----------
    store
        Features of its images, with the outputs that the system's settings name; images go by their number in it.
    text
        Normal and anomalous text features, L2-normalised; None for a system that reads none.
    drawn
        For each image the numbers of the other images drawn for it.
    shots
        Features of normal images of the category; None where the system wants none.
    paths
        The image files, by number.
    category
        Its name, for prompts that a system makes itself.
    encoder
        The model that made the features.
    checkpoint
        What the system was trained to; None where it is not trained.
    seed
        Of whatever the system draws.
    device
        Where to compute.
    batch_size
        Images at a time, at most.
    """

    store: FeatureStore
    text: Float32[Tensor, "2 D"] | None
    drawn: Int64[ndarray, "n k"]
    shots: FeatureStore | None
    paths: tuple[Path, ...]
    category: str
    encoder: EncoderSettings
    checkpoint: Path | None
    seed: int
    device: torch.device
    batch_size: int

    @property
    def text_on_device(self) -> Float32[Tensor, "2 D"]:
        """`text` on the device, for a system that reads it.

        Raises
        ------
        InputError
            It is of another dimension than the features.
        """
        if self.text is None:
            raise ValueError("a system that reads text features was given none")
        if self.text.shape != (2, self.store.dim):
            rule = f"features of {self.store.dim} numbers do not fit text features of shape {tuple(self.text.shape)}"
            raise InputError(self.store.folder, rule)
        return self.text.to(self.device)


@dataclass(frozen=True)
class Scored:
    """One image's result; higher is more anomalous.

    Attributes
    ----------
    number
        The image's, in `CategoryFeatures.store`.
    score
        Of the image.
    map
        Of each of its crops: patches, or pixels of a crop; one side g for all images.
    """

    number: int
    score: float
    map: Float32[Tensor, "C g g"]
