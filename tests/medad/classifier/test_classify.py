"""The map of the voxel classifier on phantoms with an obvious lesion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray

from medad.classifier.features import LiverStack, voxel_features
from medad.classifier.model import classify, load_classifier
from medad.classifier.stacking import Stacking
from medad.slices.prepared_file import PreparedCase, load_prepared
from tests.medad.prepared import save_slices
from tests.medad.trained_trees import write_dark_is_lesion


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dark_is_lesion(tmp_path_factory.mktemp("trees"))


def _phantom(folder: Path, plane_mm: float = 3.0) -> tuple[PreparedCase, ndarray]:
    """Return a noisy liver with a ball of -100 HU, and the ball."""
    z, y, x = np.indices((12, 32, 32))
    organ = np.hypot(y - 16, x - 16) < 14
    ball = ((z - 6) * plane_mm) ** 2 + ((y - 13) * 2) ** 2 + ((x - 14) * 2) ** 2 < 12**2
    pixels = 128 + np.random.default_rng(0).normal(0, 4, organ.shape) - 85 * ball
    pixels = np.where(organ, np.rint(pixels), 0).astype(np.uint8)
    save_slices(folder, pixels, organ, affine=np.diag([-2.0, -2.0, plane_mm, 1.0]), grey_per_hu=0.85)
    return load_prepared(folder / "prepared.safetensors"), ball


@pytest.mark.parametrize("plane_mm", [3.0, 1.2])
def test_an_obvious_lesion_is_found_and_all_else_is_not(trees: Path, tmp_path: Path, plane_mm: float) -> None:
    case, ball = _phantom(tmp_path, plane_mm)
    [found] = classify(case, [load_classifier(trees)], threads=1)
    assert found.shape == case.slices.pixels.shape
    assert found.dtype == np.float32
    assert (found[~case.slices.organ] == 0).all()
    assert found.min() >= 0
    assert found.max() <= 1
    marked = found > 0.5
    assert 2 * np.count_nonzero(marked & ball) / (marked.sum() + ball.sum()) > 0.7
    far = case.slices.organ & (np.hypot(*(np.indices((32, 32)) - np.array([13, 14])[:, None, None])) > 12)
    assert found[far].mean() < 0.1


def test_the_map_is_the_trees_output_at_each_voxel(
    trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with one prediction of all voxels, also if the trees get them in small parts."""
    case, _ = _phantom(tmp_path)
    booster = load_classifier(trees)
    stack: LiverStack = Stacking.of(case).stack(case)
    expected = np.zeros(stack.organ.shape)
    expected[stack.organ] = booster.predict(voxel_features(stack), num_threads=1)
    monkeypatch.setattr("medad.classifier.model._PART", 777)
    [found] = classify(case, [booster], threads=1)
    assert np.allclose(found, expected, atol=1e-6)


def test_several_classifiers_give_their_own_maps(trees: Path, tmp_path: Path) -> None:
    case, _ = _phantom(tmp_path)
    other = write_dark_is_lesion(tmp_path / "other", trees=1)
    boosters = [load_classifier(trees), load_classifier(other)]
    both = classify(case, boosters, threads=1)
    for booster, found in zip(boosters, both, strict=True):
        assert np.array_equal(classify(case, [booster], threads=1)[0], found)
    assert not np.allclose(both[0], both[1])
