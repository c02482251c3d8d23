"""The cached step that samples the training voxels of the voxel classifier from copies of a healthy scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medad.anomalies.copies import NO_SHIFT, load_copies
from medad.base.errors import ConfigError, InputError
from medad.classifier.augmentation import add_stack_noise, augment_stack
from medad.classifier.features import voxel_features
from medad.classifier.stacking import Stacking
from medad.config.anomalies import AugmentationSettings
from medad.config.training import ClassifierSettings
from medad.slices.prepared_file import PREPARED, load_prepared

SAMPLES = "voxels.safetensors"


def write_samples(
    prepared: Path,
    copies: Path,
    settings: ClassifierSettings,
    augmentation: AugmentationSettings | None,
    seed: int,
    out: Path,
) -> None:
    """Sample features and labels of voxels from all copies of a prepared case, and write voxels.safetensors.

    A copy is the healthy liver, augmented, with its lesions and with noise. At most half of its voxels are lesion.
    """
    case = load_prepared(prepared / PREPARED)
    if case.grey_per_hu is None:
        raise ConfigError("the voxel classifier needs slices prepared with preprocess.equalise: false")
    stacking = Stacking.of(case)
    healthy = stacking.stack(case)
    lesions = load_copies(copies)
    features, labels = [], []
    for copy, (shift, mask) in enumerate(zip(lesions.shift, lesions.mask, strict=True)):
        rng = np.random.default_rng([seed, len(case.slices.z), copy])
        hu = healthy.hu
        if augmentation is not None:
            hu = augment_stack(healthy, augmentation, settings, rng)
        added = stacking.mean((shift.astype(np.float32) - NO_SHIFT) / np.float32(case.grey_per_hu))
        hu = add_stack_noise(hu + added, healthy.organ, settings.noise_hu, rng)
        lesion = (stacking.mean(mask.astype(np.float32)) > 0.5) & healthy.organ
        chosen = _choose(healthy.organ, lesion, settings.voxels, rng)
        features.append(voxel_features(healthy.with_hu(hu), chosen))
        labels.append(lesion[chosen].astype(np.uint8))
    save_file({"features": np.concatenate(features), "labels": np.concatenate(labels)}, out / SAMPLES)


def _choose(
    organ: Bool[ndarray, "P S S"], lesion: Bool[ndarray, "P S S"], most: int, rng: np.random.Generator
) -> Bool[ndarray, "P S S"]:
    """Choose voxels at random: at most `most`, and at most half of these in lesions."""
    chosen = np.zeros(organ.size, bool)
    inside, outside = np.flatnonzero(lesion & organ), np.flatnonzero(organ & ~lesion)
    for voxels, count in ((inside, most // 2), (outside, most - min(len(inside), most // 2))):
        chosen[rng.choice(voxels, min(count, len(voxels)), replace=False)] = True
    return chosen.reshape(organ.shape)


def load_samples(folder: Path) -> tuple[Float32[ndarray, "voxels features"], UInt8[ndarray, " voxels"]]:
    """Read features and labels. Raises InputError for a missing or damaged file."""
    try:
        arrays = load_file(folder / SAMPLES)
    except (SafetensorError, OSError) as error:
        raise InputError(folder / SAMPLES, f"training voxels cannot be read ({error})") from error
    return arrays["features"], arrays["labels"]
