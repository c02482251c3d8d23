"""Training of the voxel classifier on sampled voxels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from medad.base.errors import InputError
from medad.base.progress import OnProgress, Progress
from medad.base.storage import write_bytes
from medad.classifier.features import NAMES
from medad.classifier.model import CLASSIFIER, load_classifier, parse_trees
from medad.classifier.samples import load_samples
from medad.config.training import ClassifierSettings

if TYPE_CHECKING:
    from lightgbm import Booster

_TREES_PER_PART = 25
_FEATURE_SHARE = 0.1
"""Share of the features that a tree may use. With half of them, all trees rely on the same few features, and the result
varies more between seeds and generalises worse to other scans."""
_LOSS_VOXELS = 10_000


def train_classifier(
    samples: Sequence[Path],
    settings: ClassifierSettings,
    seed: int,
    out: Path,
    *,
    initial: Path | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Train boosted trees (LightGBM; Ke et al., 2017) and write them as classifier.txt, a text file.

    Parameters
    ----------
    samples
        Folders that `medad.classifier.samples.write_samples` wrote.
    seed
        Seed of the features that each tree may use.
    initial
        Folder with a classifier whose trees come first. `settings.trees` trees are added.
    checkpoint
        File for resuming, written every 25 trees and read at the start if it exists. The caller removes it.
    on_progress
        Function called after each part.

    Raises
    ------
    InputError
        Training voxels or the initial classifier are missing or damaged, or no voxel is lesion.
    """
    # torch brings the OpenMP library that LightGBM needs; not every machine has one
    import torch  # noqa: F401, I001
    import lightgbm

    began = time.monotonic()
    loaded = [load_samples(folder) for folder in samples]
    features = np.concatenate([each for each, _ in loaded])
    labels = np.concatenate([each for _, each in loaded])
    if not labels.any():
        raise InputError("training voxels", "no copy of a healthy scan has a lesion; see synthesis.solid")
    start = None if initial is None else initial / CLASSIFIER
    before = 0 if initial is None else load_classifier(initial).num_trees()
    done = 0
    if checkpoint is not None and (saved := _saved(checkpoint)) is not None:
        start, done = checkpoint, saved - before
    data = lightgbm.Dataset(features, labels, feature_name=list(NAMES), free_raw_data=False)
    while done < settings.trees:
        part = min(_TREES_PER_PART, settings.trees - done)
        values = {
            "objective": "binary",
            "num_leaves": settings.leaves,
            "learning_rate": settings.learning_rate,
            "min_data_in_leaf": 100,
            "feature_fraction": _FEATURE_SHARE,
            "lambda_l2": 1.0,
            "seed": seed + done,  # a resumed training draws the same features as an uninterrupted one
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }
        booster = lightgbm.train(values, data, part, init_model=None if start is None else str(start))
        done += part
        start = checkpoint or out / CLASSIFIER
        write_bytes(start, booster.model_to_string(num_iteration=-1).encode())
        if on_progress is not None:
            left = (time.monotonic() - began) / done * (settings.trees - done)
            on_progress(
                Progress(
                    "classifier", done, settings.trees, done, settings.trees, _loss(booster, features, labels), left
                )
            )
    assert start is not None
    write_bytes(out / CLASSIFIER, start.read_bytes())


def _saved(checkpoint: Path) -> int | None:
    """Return the number of trees in a checkpoint. None: it is missing or damaged."""
    try:
        return int(parse_trees(checkpoint.read_text(encoding="utf-8")).num_trees())
    except (OSError, ValueError):
        return None


def _loss(booster: Booster, features: Float32[ndarray, "voxels features"], labels: UInt8[ndarray, " voxels"]) -> float:
    """Return the mean cross entropy of some training voxels."""
    step = max(1, len(labels) // _LOSS_VOXELS)
    probability = np.clip(booster.predict(features[::step]), 1e-7, 1 - 1e-7)
    truth = labels[::step]
    return float(-np.mean(np.log(np.where(truth, probability, 1 - probability))))
