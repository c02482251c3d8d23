"""Trainings that start from another model, and the model in the package as the default of the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from medad.models.pack import pack

Cli = Callable[..., Any]
TINY_STEP = {"epochs": 1, "steps": 1, "learning_rate": 1e-9}
IN_HU: dict[str, Any] = {
    "preprocess": {"slice_px": 64, "equalise": False, "standardise": "median"},
    "synthesis": {"kind": "solid_lesions", "solid": {"copies": 2}},
    "classifier": {"trees": 3, "voxels": 200},
    "train": {"members": 2, "restoration": TINY_STEP, "segmentation": TINY_STEP},
    "postprocess": {"threshold": "calibrated"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    world = new_world(tmp_path_factory.mktemp("base"), train=2, test=1)
    values = yaml.safe_load(world.config.read_text(encoding="utf-8")) | IN_HU
    world.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return world


@pytest.fixture(scope="module")
def base(world: Any, cli: Cli) -> Iterator[Path]:
    """Return the run folder of a model with two members."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        ran = cli("liver", "train", world.config, "--name", "base", "--out", world.runs, "--json")
        assert ran.code == 0, ran.err
        yield Path(ran.answer["run_folder"])


@pytest.fixture
def default(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pack the base as the package's default model."""
    monkeypatch.setattr("medad.config.packaged.MODELS", tmp_path / "models")
    pack(base, tmp_path / "models" / "default")
    return tmp_path / "models" / "default"


@pytest.fixture
def other_btcv(new_world: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a folder of two other training scans than the base's."""
    from medad.cohort.phantom import write_btcv_phantoms

    folder = tmp_path / "other"
    write_btcv_phantoms(folder, 2, seed=9, shape=(48, 40, 10), spacing_mm=(7.0, 7.0, 12.0))
    return folder


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between the weights of two files."""
    left, right = load_file(one), load_file(other)
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def test_a_training_starts_from_each_member_of_the_base(
    world: Any, base: Path, cli: Cli, other_btcv: Path, tmp_path: Path
) -> None:
    options = ("--train", other_btcv, "--name", "next", "--out", tmp_path / "runs", "--seed", 5, "--json")
    ran = cli("liver", "train", world.config, "--from", base, *options)
    assert ran.code == 0, ran.err
    folder = Path(ran.answer["run_folder"])
    files = sorted(path.relative_to(folder) for path in folder.rglob("model.safetensors"))
    assert len(files) == 4
    for file in files:
        assert difference(folder / file, base / file) < 1e-6
    one, two = (base / "model" / f"member-{n}" / "restoration" / "model.safetensors" for n in (1, 2))
    assert difference(one, two) > 1e-2
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    known = {row["sha256"]["scan"] for row in manifest["inputs"] if row["use"] == "train"}
    of_base = json.loads((base / "manifest.json").read_text(encoding="utf-8"))
    assert len(known) == 4
    assert {row["sha256"]["scan"] for row in of_base["inputs"]} < known
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert not any("also trained" in note for note in report["notes"])


def test_the_bases_scans_are_not_tested(world: Any, base: Path, cli: Cli, other_btcv: Path, tmp_path: Path) -> None:
    """The leak check of a later evaluation knows the scans that trained the base."""
    options = ("--train", other_btcv, "--name", "next", "--out", tmp_path / "runs", "--json")
    model = cli("liver", "train", world.config, "--from", base, *options).answer["run_folder"]
    tested = cli(
        "liver", "evaluate", world.config, "--model", model, "--name", "leak", "--out", tmp_path / "runs",
        "--test", world.btcv, "--set", "test_data.layout=btcv", "--json",
    )  # fmt: skip
    assert tested.code == 2
    assert any(failure["stage"] == "leakage" for failure in tested.answer["failures"])


def test_the_same_scans_again_are_noted(world: Any, base: Path, cli: Cli, tmp_path: Path) -> None:
    ran = cli("liver", "train", world.config, "--from", base, "--name", "same", "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    report = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    assert any("also trained the model" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("restoration.groups=2", "`restoration` differs"),
        ("segmentation.groups=2", "`segmentation` differs"),
        ("preprocess.slice_px=96", "`preprocess` differs"),
    ],
)
def test_a_base_that_does_not_fit_is_one_line(
    world: Any, base: Path, cli: Cli, tmp_path: Path, change: str, rule: str
) -> None:
    command = ("liver", "train", world.config, "--from", base, "--name", "next", "--out", tmp_path)
    ran = cli(*command, "--set", change)
    assert ran.code == 2
    assert rule in ran.err
    assert len(ran.err.splitlines()) == 1


def test_joint_training_starts_from_no_model(world: Any, base: Path, cli: Cli, tmp_path: Path) -> None:
    changes = ("--set", "train.schedule=joint", "--set", "train.members=1", "--set", "postprocess.threshold=0.5")
    ran = cli("liver", "train", world.config, "--from", base, "--name", "next", "--out", tmp_path, *changes)
    assert ran.code == 2
    assert "train.schedule joint cannot start from another model" in ran.err


def test_the_packages_model_is_the_default(world: Any, default: Path, base: Path, cli: Cli, tmp_path: Path) -> None:
    scan, label = world.lits / "volume-0.nii.gz", world.lits / "segmentation-0.nii.gz"
    options = ("--liver", label, "--liver-label", 1, "--liver-label", 2, "--json")
    out = tmp_path / "out"
    ran = cli("liver", "segment", scan, *options, "--out", out)
    assert ran.code == 0, ran.err
    files = {path.relative_to(default) for path in (default / "model").rglob("*.*")}
    assert files == {path.relative_to(out) for path in (out / "model").rglob("*.*")}
    rows = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["inputs"]
    assert sum(row["use"] == "train" for row in rows) == 2
    named = cli("liver", "segment", scan, *options, "--out", tmp_path / "named", "--model", "default")
    assert named.answer["computed"] == 0
    evaluated = cli(
        *("liver", "evaluate", world.config, "--model", "default", "--name", "e", "--out", tmp_path, "--json")
    )
    assert evaluated.code == 0, evaluated.err
    del base


def test_a_leak_into_the_packages_model_is_noticed(world: Any, default: Path, cli: Cli, tmp_path: Path) -> None:
    del default
    tested = cli(
        "liver", "evaluate", world.config, "--model", "default", "--name", "leak", "--out", tmp_path / "runs",
        "--test", world.btcv, "--set", "test_data.layout=btcv", "--json",
    )  # fmt: skip
    assert tested.code == 2
    assert any(failure["stage"] == "leakage" for failure in tested.answer["failures"])


def test_training_and_sensitivity_take_the_packages_model(
    world: Any, default: Path, cli: Cli, other_btcv: Path, tmp_path: Path
) -> None:
    del default
    options = ("--train", other_btcv, "--name", "next", "--out", tmp_path / "runs", "--json")
    trained = cli("liver", "train", world.config, "--from", "default", *options)
    assert trained.code == 0, trained.err
    study = ("--healthy", other_btcv, "--out", tmp_path / "study", "--set", "false_positive_ml=0.5", "--dry-run")
    planned = cli("liver", "sensitivity", "default", *study, "--json")
    assert planned.code == 0, planned.err
    assert any(row["step"] == "sensitivity" for row in planned.answer["plan"])


def test_an_inbox_without_a_model_takes_the_packages(world: Any, default: Path, cli: Cli, tmp_path: Path) -> None:
    del default
    inbox = tmp_path / "inbox.yaml"
    values = {
        "name": "ward",
        "inbox": str(world.lits),
        "out": str(tmp_path / "results"),
        "scans": "volume-*.nii.gz",
        "livers": "segmentation-*.nii.gz",
        "liver_labels": [1, 2],
        "unchanged_s": 0,
        "settings": {"gpus": "cpu"},
    }
    inbox.write_text(yaml.safe_dump(values), encoding="utf-8")
    ran = cli("liver", "inbox", inbox, "--json")
    assert ran.code == 0, ran.err
    [case_id] = ran.answer["segmented"]
    named = cli("liver", "inbox", inbox, "--set", "model=default", "--retry", case_id, "--json")
    assert (named.answer["segmented"], named.answer["computed"]) == ([case_id], 0)


def test_a_package_without_a_model_says_so(
    world: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medad.config.packaged.MODELS", tmp_path / "none")
    scan, label = world.lits / "volume-0.nii.gz", world.lits / "segmentation-0.nii.gz"
    for command in (
        ("segment", scan, "--liver", label, "--out", tmp_path / "out"),
        ("evaluate", world.config, "--model", "default", "--name", "e", "--out", tmp_path),
        ("train", world.config, "--from", "default", "--name", "t", "--out", tmp_path),
        ("sensitivity", "default", "--healthy", world.btcv, "--out", tmp_path / "study"),
    ):
        ran = cli("liver", *command)
        assert ran.code == 2
        assert "the package contains no model `default`" in ran.err
        assert len(ran.err.splitlines()) == 1
