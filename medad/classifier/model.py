"""The voxel classifier's trees: its file, and its map of a liver."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medad.base.errors import InputError
from medad.classifier.features import NAMES, voxel_features
from medad.classifier.stacking import Stacking
from medad.slices.prepared_file import PreparedCase

if TYPE_CHECKING:
    from lightgbm import Booster

CLASSIFIER = "classifier.txt"
_PART = 200_000
"""Number of voxels that the trees classify at a time."""


def load_classifier(folder: Path) -> Booster:
    """Load the trees of a folder. Raises InputError for a missing or damaged file, or for trees of other features."""
    # torch brings an OpenMP library, which LightGBM needs and which not every machine has
    import torch  # noqa: F401
    from lightgbm import Booster
    from lightgbm.basic import LightGBMError

    path = folder / CLASSIFIER
    try:
        booster = Booster(model_str=path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, LightGBMError) as error:
        raise InputError(path, f"the voxel classifier cannot be read ({error})") from error
    if tuple(booster.feature_name()) != NAMES:
        raise InputError(path, "the voxel classifier was trained on other features")
    return booster


def classify(case: PreparedCase, classifiers: list[Booster], threads: int = 0) -> list[Float32[ndarray, "N S S"]]:
    """Return each classifier's map of P(tumour), 0..1, on the slices of a prepared case. It is 0 outside the liver.

    The features are computed once for all classifiers. Thin planes are averaged in groups first (`Stacking`).
    `threads` is the number of threads, 0 for all.
    """
    stacking = Stacking.of(case)
    stack = stacking.stack(case)
    features = voxel_features(stack)
    maps = []
    for booster in classifiers:
        values = np.zeros(stack.organ.shape, np.float32)
        parts = [
            booster.predict(features[start : start + _PART], num_threads=threads)
            for start in range(0, len(features), _PART)
        ]
        values[stack.organ] = np.concatenate(parts)
        maps.append(np.where(case.slices.organ, stacking.to_slices(values), np.float32(0)))
    return maps
