"""Training voxels of the classifier: how many, which labels, and that equal seeds give equal voxels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from safetensors.numpy import save_file

from medad.anomalies.copies import COPIES, NO_SHIFT
from medad.base.errors import ConfigError, InputError
from medad.classifier.features import NAMES
from medad.classifier.samples import SAMPLES, load_samples, write_samples
from medad.config.anomalies import AugmentationSettings
from medad.config.training import ClassifierSettings
from tests.medad.prepared import save_slices

GREY_PER_HU = 0.85
PLAIN = ClassifierSettings(voxels=400, noise_hu=(0, 0), fissure_share=0)


def _organ() -> ndarray:
    organ = np.zeros((8, 32, 32), bool)
    organ[:, 6:26, 5:25] = True
    return organ


def _lesion(size: int) -> ndarray:
    mask = np.zeros((8, 32, 32), bool)
    mask[2:6, 8 : 8 + size, 8 : 8 + size] = True
    return mask


def _case(
    folder: Path, lesions: list[ndarray], *, plane_mm: float = 3.0, grey_per_hu: float | None = GREY_PER_HU
) -> Path:
    """Write a constant liver and copies of it with lesions of -60 grey values."""
    pixels = np.where(_organ(), 128, 0).astype(np.uint8)
    save_slices(folder, pixels, _organ(), affine=np.diag([-2.0, -2.0, plane_mm, 1.0]), grey_per_hu=grey_per_hu)
    masks = np.stack(lesions)
    shift = np.where(masks, NO_SHIFT - 60, NO_SHIFT).astype(np.uint8)
    save_file({"shift": shift, "mask": np.packbits(masks, axis=-1)}, folder / COPIES)
    return folder


def _sample(
    case: Path, settings: ClassifierSettings = PLAIN, seed: int = 0, augmentation: AugmentationSettings | None = None
) -> tuple[ndarray, ndarray]:
    out = case / f"out{len(list(case.iterdir()))}"
    out.mkdir()
    write_samples(case, case, settings, augmentation, seed, out)
    return load_samples(out)


def _column(features: ndarray, name: str) -> ndarray:
    found: ndarray = features[:, NAMES.index(name)]
    return found


def test_labels_are_the_lesions_of_each_copy(tmp_path: Path) -> None:
    """In a constant liver without noise, a voxel is lesion exactly where the lesion's HU were added."""
    features, labels = _sample(_case(tmp_path, [_lesion(8), _lesion(5)]))
    assert features.shape == (800, len(NAMES))
    assert np.array_equal(labels == 1, _column(features, "mean_0") < -30)
    assert np.allclose(_column(features, "mean_0")[labels == 1], -60 / GREY_PER_HU, atol=1e-3)


@pytest.mark.parametrize(("size", "expected"), [(8, 200), (5, 100), (3, 36)])
def test_at_most_half_of_the_voxels_are_lesion(tmp_path: Path, size: int, expected: int) -> None:
    assert np.count_nonzero(_lesion(size)) in (256, 100, 36)
    features, labels = _sample(_case(tmp_path, [_lesion(size)]))
    assert len(features) == 400
    assert np.count_nonzero(labels) == expected


def test_a_copy_without_lesion_gives_healthy_voxels_only(tmp_path: Path) -> None:
    features, labels = _sample(_case(tmp_path, [np.zeros((8, 32, 32), bool)]))
    assert len(features) == 400
    assert not labels.any()


def test_a_small_liver_gives_all_of_its_voxels(tmp_path: Path) -> None:
    settings = ClassifierSettings(voxels=100_000, noise_hu=(0, 0), fissure_share=0)
    _, labels = _sample(_case(tmp_path, [_lesion(8)]), settings)
    assert len(labels) == np.count_nonzero(_organ())
    assert np.count_nonzero(labels) == np.count_nonzero(_lesion(8))


def test_thin_planes_are_averaged_with_their_lesions(tmp_path: Path) -> None:
    """Two planes of 1.2 mm are one: the lesion fills groups 1 and 2 of four."""
    settings = ClassifierSettings(voxels=100_000, noise_hu=(0, 0), fissure_share=0)
    _, labels = _sample(_case(tmp_path, [_lesion(8)], plane_mm=1.2), settings)
    assert len(labels) == np.count_nonzero(_organ()) // 2
    assert np.count_nonzero(labels) == np.count_nonzero(_lesion(8)) // 2


def test_equal_seeds_give_equal_voxels_and_other_seeds_others(tmp_path: Path) -> None:
    case = _case(tmp_path, [_lesion(8), _lesion(8)])
    settings = ClassifierSettings(voxels=400)
    first, again, other = (_sample(case, settings, seed, AugmentationSettings()) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0][:400], first[0][400:]), "copies are augmented differently"


def test_noise_and_augmentation_change_healthy_voxels_too(tmp_path: Path) -> None:
    case = _case(tmp_path, [_lesion(5)])
    cases: tuple[tuple[Any, Any], ...] = (
        (ClassifierSettings(voxels=400, noise_hu=(8, 8)), None),
        (ClassifierSettings(voxels=400, noise_hu=(0, 0), vessel_share=1), AugmentationSettings()),
    )
    for settings, augmentation in cases:
        features, labels = _sample(case, settings, 0, augmentation)
        assert _column(features, "mean_0")[labels == 0].std() > 0.5


def test_equalised_slices_are_refused(tmp_path: Path) -> None:
    case = _case(tmp_path, [_lesion(5)], grey_per_hu=None)
    with pytest.raises(ConfigError, match="equalise: false"):
        _sample(case)


def test_missing_copies_and_damaged_voxels_are_one_line(tmp_path: Path) -> None:
    case = _case(tmp_path, [_lesion(5)])
    (case / COPIES).unlink()
    with pytest.raises(InputError, match="copies with lesions cannot be read"):
        _sample(case)
    (tmp_path / SAMPLES).write_bytes(b"\0" * 50)
    with pytest.raises(InputError, match="training voxels cannot be read"):
        load_samples(tmp_path)
