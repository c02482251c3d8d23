"""Training voxels and classifiers that tests make by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from medad.classifier.features import NAMES
from medad.classifier.samples import SAMPLES
from medad.classifier.training import train_classifier
from medad.config.training import ClassifierSettings


def write_voxels(folder: Path, count: int = 2000, seed: int = 0) -> Path:
    """Write random features of voxels. A voxel is lesion if its mean over 5 mm is below -20 HU."""
    folder.mkdir(parents=True, exist_ok=True)
    features = np.random.default_rng(seed).normal(0, 20, (count, len(NAMES))).astype(np.float32)
    labels = (features[:, NAMES.index("mean_5")] < -20).astype(np.uint8)
    save_file({"features": features, "labels": labels}, folder / SAMPLES)
    return folder


def write_dark_is_lesion(folder: Path, trees: int = 20) -> Path:
    """Write a classifier that takes voxels with a mean over 5 mm below -20 HU for lesion."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = write_voxels(folder / "samples", 4000)
    train_classifier([samples], ClassifierSettings(trees=trees, leaves=8, learning_rate=0.3), 0, folder)
    return folder
