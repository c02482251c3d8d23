"""Models of several members: who trains on which patients, and the files from the training to the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.liver.training import member_seed, patients_left_out
from medad.steps.trained import TrainedModel

Cli = Callable[..., Any]
IN_HU: dict[str, Any] = {
    "preprocess": {"slice_px": 64, "equalise": False, "standardise": "median"},
    "synthesis": {"kind": "solid_lesions", "solid": {"copies": 2}},
    "classifier": {"trees": 3, "voxels": 200},
    "train": {
        "members": 3,
        "restoration": {"epochs": 1, "steps": 2},
        "segmentation": {"epochs": 1, "steps": 3},
    },
    "postprocess": {"threshold": "calibrated"},
}


@given(
    patients=st.lists(st.integers(0, 30).map(str), min_size=1, max_size=30),
    members=st.integers(1, 10),
    seed=st.integers(0, 5),
)
def test_parts_are_disjoint_balanced_and_complete(patients: list[str], members: int, seed: int) -> None:
    parts = patients_left_out(patients, members, seed)
    keys = set(patients)
    count = min(members, len(keys))
    assert len(parts) == count
    assert parts == patients_left_out(sorted(keys, reverse=True), members, seed), "order and number of scans"
    if count == 1:
        assert parts == [frozenset()]
        return
    assert Counter(key for part in parts for key in part) == Counter(keys)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(keys - part for part in parts), "each member has a patient to train on"


def test_members_have_different_seeds() -> None:
    seeds = [member_seed(seed, number) for seed in range(20) for number in range(1, 11)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    world = new_world(tmp_path_factory.mktemp("members"), train=3, test=1)
    values = yaml.safe_load(world.config.read_text(encoding="utf-8")) | IN_HU
    world.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return world


@pytest.fixture(scope="module")
def finished(world: Any, cli: Cli) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        yield cli("liver", "run", world.config, "--out", world.runs, "--json")


def manifest_of(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(answer["run_folder"]) / "manifest.json").read_text(encoding="utf-8"))
    return found


def sidecars(cache: Path, step: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in (cache / step).glob("*/artifact.json")]


def test_a_run_folder_holds_all_members(finished: Any) -> None:
    assert finished.code == 0, finished.err
    folder = Path(finished.answer["run_folder"])
    files = {path.relative_to(folder / "model").as_posix() for path in (folder / "model").rglob("*") if path.is_file()}
    nets = {f"{net}/{name}" for net in ("restoration", "segmentation") for name in ("model.safetensors", "curve.json")}
    each = {*nets, "classifier/classifier.txt"}
    assert files == {"calibration.json", *(f"member-{number}/{name}" for number in (1, 2, 3) for name in each)}
    manifest = manifest_of(finished.answer)
    parts = {f"member-{n}/{part}" for n in (1, 2, 3) for part in ("restoration", "segmentation", "classifier")}
    assert set(manifest["models"]) == {"calibration", *parts}
    digests = [entry["digest"] for entry in manifest["models"].values()]
    assert len(set(digests)) == len(digests)
    trained = TrainedModel.of_run(folder)
    assert [member.restoration.parent.name for member in trained.model.members] == ["member-1", "member-2", "member-3"]
    assert trained.model.calibration == folder / "model"
    assert len(trained.files) == 10
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert "The model has 3 members. The training curves are those of member 1." in report["notes"]
    curve = json.loads((folder / "model" / "member-1" / "segmentation" / "curve.json").read_text(encoding="utf-8"))
    assert len(curve["loss"]) == 3


def test_each_case_calibrates_the_member_that_it_did_not_train(world: Any, finished: Any) -> None:
    del finished
    cases = {each["digest"] for each in sidecars(world.cache, "prepare") if each["parts"]["inputs"]["training"]}
    assert len(cases) == 3
    by_member = {
        each["digest"]: set(each["parts"]["inputs"]["prepared"]) for each in sidecars(world.cache, "restoration")
    }
    [calibration] = sidecars(world.cache, "calibration")
    left_out = calibration["parts"]["inputs"]["left_out"]
    assert len(left_out) == 3
    for each in left_out:
        trained_on = by_member[each["member"]["restoration"]]
        assert len(trained_on) == 2
        assert {*each["prepared"], *trained_on} == cases
        assert not trained_on & set(each["prepared"])
        assert len(each["copies"]) == len(each["prepared"]) == 1
    assert len({tuple(each["prepared"]) for each in left_out}) == 3


def test_copies_and_samples_are_made_once_per_case(world: Any, finished: Any) -> None:
    tasks = Counter(task["step"] for task in manifest_of(finished.answer)["tasks"])
    wanted = {"lesion-copies": 3, "voxel-samples": 3, "restoration": 3, "segmentation": 3, "classifier": 3}
    assert {step: tasks[step] for step in wanted} == wanted
    assert tasks["calibration"] == 1
    for step, reader, name in (
        ("lesion-copies", "restoration", "copies"),
        ("lesion-copies", "segmentation", "copies"),
        ("voxel-samples", "classifier", "samples"),
    ):
        made = {each["digest"] for each in sidecars(world.cache, step)}
        used = [each for part in sidecars(world.cache, reader) for each in part["parts"]["inputs"][name]]
        assert Counter(used) == dict.fromkeys(made, 2)


def test_a_final_member_trains_on_all_cases_and_is_the_model(
    world: Any, finished: Any, cli: Cli, tmp_path: Path
) -> None:
    cases = {each["digest"] for each in sidecars(world.cache, "prepare") if each["parts"]["inputs"]["training"]}
    ran = cli("liver", "run", world.config, "--out", tmp_path, "--set", "train.final_factor=2", "--json")
    assert ran.code == 0, ran.err
    trained = TrainedModel.of_run(Path(ran.answer["run_folder"]))
    [member] = trained.model.members
    assert trained.model.calibration is not None
    curves = [
        json.loads((net / "curve.json").read_text(encoding="utf-8"))
        for net in (member.restoration, member.segmentation)
    ]
    assert [len(curve["loss"]) for curve in curves] == [4, 6], "twice the steps of the other members"
    manifest = manifest_of(ran.answer)
    assert set(manifest["models"]) == {"calibration", "restoration", "segmentation", "classifier"}
    assert manifest["models"]["calibration"] == manifest_of(finished.answer)["models"]["calibration"]
    [final] = [
        each
        for each in sidecars(world.cache, "restoration")
        if each["digest"] == manifest["models"]["restoration"]["digest"]
    ]
    assert set(final["parts"]["inputs"]["prepared"]) == cases


def test_a_dry_run_and_a_second_run_compute_nothing(world: Any, finished: Any, cli: Cli) -> None:
    del finished
    plan = cli("liver", "run", world.config, "--out", world.runs, "--dry-run", "--json")
    assert {row["status"] for row in plan.answer["plan"]} == {"cached"}
    second = cli("liver", "run", world.config, "--out", world.runs, "--json")
    assert second.answer["computed"] == 0


def test_a_run_folder_with_members_segments_and_is_a_model_again(
    world: Any, finished: Any, cli: Cli, tmp_path: Path
) -> None:
    scan, label = world.lits / "volume-0.nii.gz", world.lits / "segmentation-0.nii.gz"
    options = ("--liver", label, "--liver-label", 1, "--liver-label", 2, "--json")
    model = finished.answer["run_folder"]
    first = cli("liver", "segment", scan, *options, "--model", model, "--out", tmp_path / "first")
    assert first.code == 0, first.err
    second = cli("liver", "segment", scan, *options, "--model", tmp_path / "first", "--out", tmp_path / "second")
    assert second.code == 0, second.err
    assert second.answer["computed"] == 1, "only the report is new"
    files = {path.relative_to(tmp_path / "first") for path in (tmp_path / "first" / "model").rglob("*.*")}
    assert files == {path.relative_to(tmp_path / "second") for path in (tmp_path / "second" / "model").rglob("*.*")}
    evaluated = cli(
        *("liver", "evaluate", world.config, "--model", model, "--name", "again", "--out", tmp_path, "--json")
    )
    assert evaluated.code == 0, evaluated.err
    assert evaluated.answer["headline"] == finished.answer["headline"]


def test_one_patient_trains_one_member_without_calibration(
    world: Any, finished: Any, cli: Cli, new_world: Callable[..., Any], tmp_path: Path
) -> None:
    del finished
    one = new_world(tmp_path / "one", train=1, test=1)
    ran = cli(
        *("liver", "run", world.config, "--train", one.btcv, "--name", "one", "--out", tmp_path / "runs", "--json")
    )
    assert ran.code == 0, ran.err
    folder = Path(ran.answer["run_folder"])
    assert (folder / "model" / "restoration" / "model.safetensors").is_file()
    assert not (folder / "model" / "calibration.json").exists()
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (
        "The training data have 1 patient, so the model has 1 member instead of 3. Its threshold was not calibrated."
        in report["notes"]
    )


def test_a_row_of_an_ablation_has_members(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    """The run's trainings are those of the row with the same seed, so only pictures and the report are computed."""
    ablation = world.root / "ablation.yaml"
    values = {"name": "ablation", "base": "tiny", "seeds": [0], "panels": 1, "rows": [{"name": "all", "label": "all"}]}
    ablation.write_text(yaml.safe_dump(values), encoding="utf-8")
    ran = cli("liver", "ablate", ablation, "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    computed = {task["step"] for task in manifest_of(ran.answer)["tasks"] if not task["cached"]}
    assert computed == {"examples", "embedding", "baseline", "ablation"}
    report = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    [row] = report["rows"]
    assert row["stats"]["micro_dice_2d"]["mean"] == finished.answer["headline"]["micro_dice_2d"]
    assert any("member 1" in note for note in report["notes"])


@pytest.mark.slow
def test_members_train_side_by_side_on_two_devices(
    world: Any, prefect_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    """Two simulated GPUs take the networks, and the CPU takes the classifiers. The weights are the same as on one."""
    monkeypatch.setenv("ADFLOWS_PRETEND_GPUS", "2")
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    ran = prefect_cli("liver", "train", world.config, "--set", "gpus=auto", "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    devices: dict[str, set[str]] = {}
    for task in manifest_of(ran.answer)["tasks"]:
        devices.setdefault(task["step"], set()).add(task["device"])
    assert devices["restoration"] | devices["segmentation"] == {"gpu-0", "gpu-1"}
    assert devices["classifier"] == {"cpu"}
    name = "model/member-2/restoration/model.safetensors"
    on_one = Path(finished.answer["run_folder"]) / name
    assert (Path(ran.answer["run_folder"]) / name).read_bytes() == on_one.read_bytes()
