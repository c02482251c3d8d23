"""Patients in both training and test data are found before any training, in any file format. Folds separate them."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.liver.flow import UNKNOWN_TRAINING_NOTE
from medad.cohort.folds import patient_mark
from tests.flows.leaks import database_bytes, find_leaks, find_secrets

Cli = Callable[..., Any]
INSERT = '{"count": 1, "diameter_mm": [30, 40], "edge_mm": 3}'
SIZE: dict[str, Any] = {"shape": (48, 40, 10), "spacing_mm": (7.0, 7.0, 12.0)}
PLACE = "train and test data"
NEVER = "no patient may be in both"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    return new_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model(world: Any, cli: Cli) -> Path:
    """Return the folder of a run that trained on the world's healthy phantoms. It uses another cache than the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        ran = cli("liver", "run", world.config, "--out", world.runs, "--json")
        assert ran.code == 0, ran.err
    return Path(ran.answer["run_folder"])


def rows(folder: str | Path, use: str) -> dict[str, dict[str, Any]]:
    manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    return {row["case"]: row for row in manifest["inputs"] if row["use"] == use}


def steps(cache: Path) -> set[str]:
    """Return the steps that wrote artifacts."""
    others = {"tmp", "runs", "locks", "results", "digests.sqlite", "report"}
    return {path.name for path in cache.iterdir() if path.name not in others}


def refused(ran: Any, rule: str) -> None:
    """Check for exit code 2 and one line, which is also in the report."""
    assert ran.code == 2
    assert [(failure["case"], failure["stage"], failure["rule"]) for failure in ran.answer["failures"]] == [
        (PLACE, "leakage", rule)
    ]
    assert ran.err.splitlines().count(f"{PLACE}: {rule}") == 1
    assert "Traceback" not in ran.err


def stored_otherwise(world: Any, root: Path) -> Path:
    """Store the world's second healthy scan as an uncompressed .nii with another number."""
    for kind in ("img", "label"):
        (root / kind).mkdir(parents=True)
        content = (world.btcv / kind / f"{kind}0002.nii.gz").read_bytes()
        (root / kind / f"{kind}0009.nii").write_bytes(gzip.decompress(content))
    return root


def test_a_scan_on_both_sides_ends_the_run_before_anything_is_made(
    world: Any, cli: Cli, cache: Path, tmp_path: Path
) -> None:
    command = ("liver", "run", world.config, "--out", tmp_path / "runs", "--json")
    both = ("--test", world.btcv, "--set", "test_data.layout=btcv")
    ran = cli(*command, *both)
    rule = f"btcv-0001 in training and btcv-0001 in testing are the same scan (and 1 more patient); {NEVER}"
    refused(ran, rule)
    assert steps(cache) == set()
    folder = Path(ran.answer["run_folder"])
    assert not (folder / "model").exists()
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["failures"][0]["rule"] == rule
    assert rule in (folder / "report.html").read_text(encoding="utf-8")
    dry = cli(*command, *both, "--dry-run")
    assert dry.code == 2
    assert [row["step"] for row in dry.answer["plan"]] == ["report"]
    prepared = cli("liver", "prepare", world.config, *both, "--json")
    refused(prepared, rule)
    exported = cli(
        "liver", "export-slices", world.config, *both, "--with-training", "--out", tmp_path / "slices", "--json"
    )
    assert exported.code == 2
    assert exported.answer["failures"][0]["stage"] == "leakage"
    assert not (tmp_path / "slices" / "liver").exists()
    assert steps(cache) == set()


@pytest.mark.parametrize("inserted", [False, True])
def test_a_scan_stored_otherwise_is_found_once_prepared(
    world: Any, cli: Cli, cache: Path, tmp_path: Path, inserted: bool
) -> None:
    """Inserting lesions into a scan changes its voxels but not its patient."""
    data = ("--test", stored_otherwise(world, tmp_path / "other"), "--set", "test_data.layout=btcv")
    more = ("--set", f"test_data.insert={INSERT}") if inserted else ()
    ran = cli("liver", "run", world.config, *data, *more, "--out", tmp_path / "runs", "--json")
    refused(ran, f"btcv-0002 in training and btcv-0009 in testing show the same liver, voxel for voxel; {NEVER}")
    assert steps(cache) == ({"prepare", "insert"} if inserted else {"prepare"})
    prepared = cli("liver", "prepare", world.config, *data, *more, "--json")
    assert prepared.code == 2
    assert prepared.answer["failures"][0]["stage"] == "leakage"


def test_the_settings_say_who_is_one_patient(world: Any, cli: Cli, cache: Path, tmp_path: Path) -> None:
    patients = [item for use in ("train", "test") for item in ("--set", rf"{use}_data.patients=-0*(\d+)$")]
    ran = cli("liver", "run", world.config, *patients, "--out", tmp_path / "runs", "--json")
    refused(ran, f"btcv-0001 in training and lits-1 in testing are scans of the same patient; {NEVER}")
    assert steps(cache) == set()


@pytest.fixture
def series(world: Any, tmp_path: Path) -> Path:
    """Write two different scans of one patient as DICOM series, in two folders, with their livers."""
    import nibabel
    import numpy as np
    import pydicom

    from medad.ct.dicom_write import write_dicom
    from medad.ct.io import read_scan

    for number in (1, 2):
        target = tmp_path / "dicom" / f"side{number}" / "one"
        (target / "CT").mkdir(parents=True)
        volume = read_scan(world.btcv / "img" / f"img000{number}.nii.gz")
        write_dicom(target / "CT", volume.geometry.to_source(volume.hu), volume.geometry.affine)
        for path in (target / "CT").iterdir():
            data = pydicom.dcmread(path)
            data.PatientID = "PID4711-0815"
            data.save_as(path)
        label: Any = nibabel.load(world.btcv / "label" / f"label000{number}.nii.gz")
        liver = (np.asarray(label.dataobj) == 6).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(liver, label.affine), target / "liver.nii.gz")
    return tmp_path / "dicom"


def as_series(use: str, root: Path) -> tuple[str, ...]:
    values = {"root": str(root), "layout": "folder", "images": "*/CT", "labels": "*/liver.nii.gz", "liver_labels": [1]}
    return ("--set", f"{use}_data={json.dumps(values)}")


def test_one_patients_series_are_told_by_dicoms_id_which_goes_nowhere(
    world: Any, prefect_cli: Cli, cache: Path, tmp_path: Path, series: Path
) -> None:
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import get_current_settings

    from flows.privacy.case_ids import identify, private_folder

    ids = [identify([series / f"side{number}" / "one" / "CT"])[0] for number in (1, 2)]
    sides = (*as_series("train", series / "side1"), *as_series("test", series / "side2"))
    ran = prefect_cli("liver", "run", world.config, *sides, "--out", tmp_path / "runs", "--json")
    refused(ran, f"{ids[0]} in training and {ids[1]} in testing are scans of the same patient; {NEVER}")
    assert steps(cache) == set()
    # train on one scan and evaluate on the other: only the manifest shows that they are of one patient
    trained = prefect_cli("liver", "train", world.config, *sides[:2], "--out", tmp_path / "runs", "--json")
    assert trained.code == 0, trained.err
    folder = trained.answer["run_folder"]
    salted = rows(folder, "train")[ids[0]]["patient"]
    assert len(salted) == 64
    judged = prefect_cli(
        "liver", "evaluate", world.config, *sides[2:], "--model", folder, "--name", "other", "--out", tmp_path / "runs",
        "--json",
    )  # fmt: skip
    refused(judged, f"{ids[0]} in training and {ids[1]} in testing are scans of the same patient; {NEVER}")
    secrets = ["PID4711-0815", patient_mark("PID4711-0815").digest, hashlib.sha256(b"PID4711-0815").hexdigest()]
    assert find_leaks(series, secrets[:1]), "the search finds the id in the input"
    for where in (cache, tmp_path / "runs", private_folder()):
        assert not find_leaks(where, secrets)
    assert not find_secrets((ran.out + ran.err + judged.out + judged.err).encode(), secrets)
    APILogWorker.drain_all(timeout=10)
    url = get_current_settings().server.database.connection_url
    assert url is not None
    content = database_bytes(Path(url.get_secret_value().partition("///")[2]))
    assert ids[0].encode() in content
    assert not find_secrets(content, secrets)


def test_a_models_run_says_which_cases_trained_it(
    world: Any, model: Path, cli: Cli, cache: Path, tmp_path: Path
) -> None:
    command = ("liver", "evaluate", world.config, "--out", tmp_path / "runs", "--json")
    same = ("--test", world.btcv, "--set", "test_data.layout=btcv", "--set", f"test_data.insert={INSERT}")
    ran = cli(*command, *same, "--model", model, "--name", "same")
    more = "(and 1 more patient)"
    refused(ran, f"btcv-0001 in training and btcv-0001 in testing are the same scan {more}; {NEVER}")
    assert steps(cache) <= {"model"}
    other = stored_otherwise(world, tmp_path / "other")
    data = ("--test", other, "--set", "test_data.layout=btcv", "--set", f"test_data.insert={INSERT}")
    ran = cli(*command, *data, "--model", model, "--name", "otherwise")
    refused(ran, f"btcv-0002 in training and btcv-0009 in testing show the same liver, voxel for voxel; {NEVER}")
    assert "segment" not in steps(cache)
    # the folder of an evaluation contains the model and the list of its training cases
    good = cli(*command, "--model", model, "--name", "good")
    assert good.code == 0, good.err
    assert set(rows(good.answer["run_folder"], "train")) == {"btcv-0001", "btcv-0002"}
    assert cli(*command, *data, "--model", good.answer["run_folder"], "--name", "third").code == 2
    # a folder without this list is accepted, and the report has a note
    older = tmp_path / "older"
    shutil.copytree(model, older)
    manifest = json.loads((older / "manifest.json").read_text(encoding="utf-8"))
    del manifest["inputs"]
    (older / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    ran = cli(*command, *data, "--model", older, "--name", "fourth")
    assert ran.code == 0, ran.err
    assert (
        UNKNOWN_TRAINING_NOTE
        in json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))["notes"]
    )


def test_scans_that_trained_a_model_may_be_segmented_with_it(
    world: Any, model: Path, cli: Cli, cache: Path, tmp_path: Path
) -> None:
    """Segmentation evaluates nothing. The list of training cases is copied, with numbers instead of names."""
    del cache
    scan, label = world.btcv / "img" / "img0001.nii.gz", world.btcv / "label" / "label0001.nii.gz"
    out = tmp_path / "out"
    ran = cli("liver", "segment", scan, "--liver", label, "--liver-label", 6, "--model", model, "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert set(rows(out, "train")) == {"trained-1", "trained-2"}
    assert {row["sha256"]["scan"] for row in rows(out, "train").values()} == {
        row["sha256"]["scan"] for row in rows(model, "train").values()
    }
    judged = cli(
        "liver", "evaluate", world.config, "--test", world.btcv, "--set", "test_data.layout=btcv", "--model", out,
        "--name", "again", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert judged.code == 2
    assert "trained-1 in training and btcv-000" in judged.answer["failures"][0]["rule"]


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """Write four healthy phantoms."""
    from medad.cohort.phantom import write_btcv_phantoms

    write_btcv_phantoms(tmp_path / "four", 4, seed=5, **SIZE)
    return tmp_path / "four"


def on_one_set(root: Path, index: int, count: int = 2) -> tuple[object, ...]:
    return (
        "--train", root, "--test", root, "--set", "test_data.layout=btcv", "--set", f"test_data.insert={INSERT}",
        "--set", f"folds.count={count}", "--set", f"folds.index={index}",
    )  # fmt: skip


def cases_of(ran: Any, use: str) -> set[str]:
    return {each["case"] for each in ran.answer[use]}


@pytest.mark.usefixtures("cache")
def test_folds_of_one_data_set_test_every_patient_once(world: Any, cli: Cli, four: Path, tmp_path: Path) -> None:
    everyone = {f"btcv-000{number}" for number in (1, 2, 3, 4)}
    tested = []
    for index in (0, 1):
        ran = cli("liver", "prepare", world.config, *on_one_set(four, index), "--json")
        assert ran.code == 0, ran.err
        assert cases_of(ran, "train") | cases_of(ran, "test") == everyone
        assert not cases_of(ran, "train") & cases_of(ran, "test")
        tested.append(cases_of(ran, "test"))
    assert [len(fold) for fold in tested] == [2, 2]
    assert tested[0] | tested[1] == everyone
    # with other names and in another order, the scans are in the same folds
    renamed = tmp_path / "renamed"
    for kind in ("img", "label"):
        (renamed / kind).mkdir(parents=True)
        for number in (1, 2, 3, 4):
            shutil.copy(four / kind / f"{kind}000{number}.nii.gz", renamed / kind / f"{kind}{9 - number}.nii.gz")
    ran = cli("liver", "prepare", world.config, *on_one_set(renamed, 0), "--json")
    assert {f"btcv-000{9 - int(case.removeprefix('btcv-'))}" for case in cases_of(ran, "test")} == tested[0]


@pytest.mark.usefixtures("cache")
def test_a_fold_is_a_run_like_any_other(world: Any, cli: Cli, four: Path, tmp_path: Path) -> None:
    ran = cli("liver", "run", world.config, *on_one_set(four, 1), "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    folder = ran.answer["run_folder"]
    trained, tested = rows(folder, "train"), rows(folder, "test")
    assert (len(trained), len(tested)) == (2, 2)
    assert not set(trained) & set(tested)
    report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    assert report["notes"][0] == (
        "Fold 1 of 2 (counted from 0), patients assigned with seed 0: 2 in training, 2 in testing."
    )
    assert {case["case_id"] for case in report["cases"]} == set(tested)
    # training and evaluation as separate commands use the same fold
    alone = cli("liver", "train", world.config, *(*on_one_set(four, 1)[:2], *on_one_set(four, 1)[4:]),
                "--set", f"test_data.root={four}", "--name", "alone", "--out", tmp_path / "runs", "--json")  # fmt: skip
    assert alone.code == 0, alone.err
    assert set(rows(alone.answer["run_folder"], "train")) == set(trained)
    evaluate = ("liver", "evaluate", world.config, "--model", folder, "--out", tmp_path / "runs", "--json")
    same, other = (
        cli(*evaluate, *on_one_set(four, index)[2:], "--set", f"train_data.root={four}", "--name", f"fold-{index}")
        for index in (1, 0)
    )
    assert same.code == 0, same.err
    assert same.answer["headline"] == ran.answer["headline"]
    assert other.code == 2
    assert other.answer["failures"][0]["stage"] == "leakage"


def test_patients_with_several_scans_stay_together_in_two_data_sets(
    world: Any, cli: Cli, cache: Path, tmp_path: Path
) -> None:
    """Only lits-1 shares its patient, with btcv-0001: the fold that tests lits-1 must not train on btcv-0001."""
    patients = [item for use in ("train", "test") for item in ("--set", rf"{use}_data.patients=-0*(\d+)$")]
    for index in (0, 1):
        folds = ("--set", "folds.count=2", "--set", f"folds.index={index}")
        ran = cli("liver", "prepare", world.config, *patients, *folds, "--json")
        assert ran.code == 0, ran.err
        assert cases_of(ran, "test") in ({"lits-0"}, {"lits-1"})
        assert cases_of(ran, "train") == ({"btcv-0002"} if "lits-1" in cases_of(ran, "test") else {"btcv-0001"})
    assert steps(cache) == {"prepare"}


def test_more_folds_than_patients_are_refused(world: Any, cli: Cli, cache: Path, tmp_path: Path) -> None:
    folds = ("--set", "folds.count=5", "--set", "folds.index=4")
    ran = cli("liver", "run", world.config, *folds, "--out", tmp_path / "runs", "--json")
    assert ran.code == 2
    assert ran.answer["failures"][0]["rule"] == (
        "fold 4 of 5 leaves no case in test_data; folds.count must be at most its number of patients, 2"
    )
    assert steps(cache) == set()
    gone = cli("liver", "run", world.config, *folds, "--test", tmp_path / "gone", "--out", tmp_path / "runs", "--json")
    assert gone.code == 2
    assert steps(cache) == set(), "without test data, a fold is not trained on all cases"
