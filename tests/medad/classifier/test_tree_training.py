"""Training of the voxel classifier: what it learns, equal seeds, resumed and continued trainings, damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from safetensors.numpy import save_file

from medad.base.errors import InputError
from medad.base.progress import Progress
from medad.classifier.features import NAMES
from medad.classifier.model import CLASSIFIER, load_classifier, parse_trees
from medad.classifier.samples import SAMPLES, load_samples
from medad.classifier.training import train_classifier
from medad.config.training import ClassifierSettings
from tests.killed import TrainingKilled, kill_at
from tests.medad.trained_trees import write_voxels

SETTINGS = ClassifierSettings(trees=60, leaves=4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("voxels")
    return [write_voxels(root / str(seed), seed=seed) for seed in (0, 1)]


def _train(samples: list[Path], out: Path, seed: int = 0, **more: Any) -> Path:
    out.mkdir(exist_ok=True)
    train_classifier(samples, SETTINGS, seed, out, **more)
    return out


@pytest.fixture(scope="module")
def straight(samples: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(samples, tmp_path_factory.mktemp("straight"))


def _probability(folder: Path, features: ndarray) -> ndarray:
    found: ndarray = load_classifier(folder).predict(features, num_threads=1)
    return found


def test_a_separable_problem_is_learnt(straight: Path, tmp_path: Path) -> None:
    features, labels = load_samples(write_voxels(tmp_path / "new", seed=9))
    probability = _probability(straight, features)
    assert ((probability > 0.5) == labels).mean() > 0.98
    importance = load_classifier(straight).feature_importance("gain")
    assert NAMES[int(np.argmax(importance))] == "mean_5"


def test_the_file_is_a_text_with_the_names_of_the_features(straight: Path) -> None:
    assert [path.name for path in straight.iterdir()] == [CLASSIFIER]
    text = (straight / CLASSIFIER).read_text(encoding="ascii")
    assert text.startswith("tree\n")
    assert f"feature_names={' '.join(NAMES)}\n" in text
    assert load_classifier(straight).num_trees() == SETTINGS.trees


def test_equal_seeds_give_equal_bytes_and_other_seeds_others(
    samples: list[Path], straight: Path, tmp_path: Path
) -> None:
    again, other = _train(samples, tmp_path / "again"), _train(samples, tmp_path / "other", seed=5)
    assert (again / CLASSIFIER).read_bytes() == (straight / CLASSIFIER).read_bytes()
    assert (other / CLASSIFIER).read_bytes() != (straight / CLASSIFIER).read_bytes()


@pytest.mark.parametrize("killed_at", [25, 50])
def test_a_killed_training_resumes_to_the_same_trees(
    samples: list[Path], straight: Path, tmp_path: Path, killed_at: int
) -> None:
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(TrainingKilled):
        _train(samples, tmp_path / "killed", checkpoint=checkpoint, on_progress=kill_at(killed_at))
    assert parse_trees(checkpoint.read_text(encoding="ascii")).num_trees() == killed_at
    assert not list((tmp_path / "killed").iterdir()), "the trees of a killed training are not a result"
    seen: list[Progress] = []
    resumed = _train(samples, tmp_path / "resumed", checkpoint=checkpoint, on_progress=seen.append)
    assert [each.step for each in seen] == [step for step in (25, 50, 60) if step > killed_at]
    features, _ = load_samples(samples[0])
    assert load_classifier(resumed).num_trees() == SETTINGS.trees
    assert np.abs(_probability(resumed, features) - _probability(straight, features)).max() < 1e-6


def test_a_damaged_checkpoint_counts_as_missing(samples: list[Path], straight: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    for text in ("", (straight / CLASSIFIER).read_text(encoding="ascii")[:9000]):
        checkpoint.write_text(text, encoding="ascii")
        out = _train(samples, tmp_path / "out", checkpoint=checkpoint)
        assert (out / CLASSIFIER).read_bytes() == (straight / CLASSIFIER).read_bytes()


def test_progress_counts_trees_and_the_loss_falls(samples: list[Path], tmp_path: Path) -> None:
    seen: list[Progress] = []
    _train(samples, tmp_path / "out", on_progress=seen.append)
    assert [each.step for each in seen] == [25, 50, 60]
    losses = [each.loss for each in seen]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.3


def test_a_training_that_starts_from_a_classifier_adds_trees(
    samples: list[Path], straight: Path, tmp_path: Path
) -> None:
    continued = _train(samples, tmp_path / "more", initial=straight)
    assert load_classifier(continued).num_trees() == 2 * SETTINGS.trees
    features, _ = load_samples(samples[0])
    first = load_classifier(continued).predict(features, num_iteration=SETTINGS.trees, num_threads=1)
    assert np.allclose(first, _probability(straight, features), atol=1e-9)


def test_a_continued_training_that_is_killed_resumes(samples: list[Path], straight: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(TrainingKilled):
        _train(samples, tmp_path / "killed", initial=straight, checkpoint=checkpoint, on_progress=kill_at(25))
    resumed = _train(samples, tmp_path / "resumed", initial=straight, checkpoint=checkpoint)
    whole = _train(samples, tmp_path / "whole", initial=straight)
    features, _ = load_samples(samples[1])
    assert load_classifier(resumed).num_trees() == 2 * SETTINGS.trees
    assert np.abs(_probability(resumed, features) - _probability(whole, features)).max() < 1e-6


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_classifier_that_was_cut_short_is_one_line(straight: Path, tmp_path: Path, kept: float) -> None:
    text = (straight / CLASSIFIER).read_text(encoding="ascii")
    end = text.index("end of parameters")
    (tmp_path / CLASSIFIER).write_text(text[: int(kept * end)], encoding="ascii")
    with pytest.raises(InputError, match="the voxel classifier cannot be read") as failure:
        load_classifier(tmp_path)
    assert failure.value.path == tmp_path / CLASSIFIER


@pytest.mark.parametrize(
    ("old", "new"), [("leaf_value=", "leaf_value=7 "), ("threshold=", "threshold=x"), ("num_leaves=4", "num_leaves=5")]
)
def test_a_tree_with_a_wrong_list_is_one_line(straight: Path, tmp_path: Path, old: str, new: str) -> None:
    text = (straight / CLASSIFIER).read_text(encoding="ascii")
    (tmp_path / CLASSIFIER).write_text(text.replace(old, new, 1), encoding="ascii")
    with pytest.raises(InputError, match="the voxel classifier cannot be read"):
        load_classifier(tmp_path)


def test_a_missing_file_and_one_that_is_not_text_are_one_line(tmp_path: Path, samples: list[Path]) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_classifier(tmp_path)
    (tmp_path / CLASSIFIER).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_classifier(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        _train(samples, tmp_path / "out", initial=tmp_path)


def test_trees_of_other_features_are_refused(straight: Path, tmp_path: Path) -> None:
    text = (straight / CLASSIFIER).read_text(encoding="ascii")
    (tmp_path / CLASSIFIER).write_text(text.replace(" mean_5 ", " mean_6 ", 1), encoding="ascii")
    with pytest.raises(InputError, match="trained on other features"):
        load_classifier(tmp_path)


def test_damaged_voxels_are_one_line(tmp_path: Path) -> None:
    (tmp_path / SAMPLES).write_bytes(b"no voxels")
    with pytest.raises(InputError, match="training voxels cannot be read"):
        _train([tmp_path], tmp_path / "out")


def test_voxels_without_a_lesion_are_refused(samples: list[Path], tmp_path: Path) -> None:
    features, labels = load_samples(samples[0])
    save_file({"features": features, "labels": np.zeros_like(labels)}, tmp_path / SAMPLES)
    with pytest.raises(InputError, match="no copy of a healthy scan has a lesion"):
        _train([tmp_path], tmp_path / "out")
