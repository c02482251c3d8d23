"""The flow liver-sensitivity on phantoms: it inserts, measures and reports; training cases are refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.liver import steps
from flows.store.code import closure
from flows.store.references import Ref
from flows.store.step import Call, Step, content_key
from medad.base.settings import ANY_MACHINE, MachineSettings
from medad.base.text import PLACEHOLDER
from medad.cohort.datasets import LabelledScan
from medad.cohort.phantom import write_btcv_phantoms
from medad.config.liver import DatasetSettings, InferenceSettings, PostprocessSettings, PreprocessSettings
from medad.config.sensitivity import InsertionSettings, MeasureSettings, SensitivitySettings
from medad.steps.results import Member, Model, Segmenter, VolumeResult

Cli = Callable[..., Any]
CELLS = ("--set", "diameters_mm=[20, 40, 60]", "--set", "contrasts_hu=[[-80, -50], {hu: [-60, -30], kind: mixed}]")
SMALL = (*CELLS, "--set", "edge_mm=2", "--set", "gpus=cpu", "--json")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    made = new_world(tmp_path_factory.mktemp("world"))
    write_btcv_phantoms(made.root / "healthy", 1, seed=9, shape=(48, 40, 10), spacing_mm=(7.0, 7.0, 12.0))
    return made


@pytest.fixture(scope="module")
def model(world: Any, cli: Cli) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        trained = cli("liver", "train", world.config, "--out", world.runs, "--json")
        assert trained.code == 0, trained.err
        yield Path(trained.answer["run_folder"])


@pytest.fixture(scope="module")
def study(world: Any, model: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that runs the command on the healthy phantom or another folder, with the same cache."""

    def run(*options: object, healthy: Path | None = None) -> Any:
        out = tmp_path_factory.mktemp("study") / "out"
        return cli(
            "liver", "sensitivity", model, "--healthy", healthy or world.root / "healthy", "-o", out, *SMALL, *options
        )

    return run


@pytest.fixture(scope="module")
def finished(study: Callable[..., Any]) -> Any:
    return study()


def report_of(ran: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    return found


def test_every_cell_is_inserted_and_reported(finished: Any, world: Any) -> None:
    assert finished.code == 0, finished.err
    report = report_of(finished)
    assert [(row["size_mm"], row["figures"]["planned"]) for row in report["by_size"]] == [([20, 40], 4), ([40, 60], 4)]
    assert report["summary"]["inserted"] == sum(row["figures"]["inserted"] for row in report["cells"]) > 0
    (scan,) = report["scans"]
    assert scan["healthy_false_positive_ml"] <= 5
    assert not scan["trained_on"]
    assert report["warnings"] == []
    folder = Path(finished.answer["run_folder"])
    with (folder / "lesions.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == report["summary"]["inserted"]
    assert finished.answer["headline"]["sensitivity"] == report["summary"]["sensitivity"]
    assert "how well inserted lesions are found" in finished.answer["notices"][0]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["healthy"]["root"] == PLACEHOLDER
    assert [row["use"] for row in manifest["inputs"]] == ["test"]
    names = [path.name for path in (world.cache / "sensitivity").glob("*/*")]
    assert set(names) == {"artifact.json", "lesions.json"}, "inserted scans are not stored"


def test_a_second_study_computes_what_is_new(study: Callable[..., Any], finished: Any) -> None:
    assert study().answer["computed"] == 0
    more = study("--set", "places=[inside]", "--set", "contrasts_hu=[[-80, -50], [30, 50]]")
    assert more.code == 0, more.err
    assert more.answer["computed"] == 1 + 1, "the new contrast inside the liver, and the report"
    del finished


def test_scans_of_training_are_refused_in_one_line_unless_asked_for(study: Callable[..., Any], world: Any) -> None:
    refused = study(healthy=world.btcv)
    assert refused.code == 2
    assert "was trained on btcv-0001, btcv-0002" in refused.err
    assert "--allow-training-cases" in refused.err.splitlines()[-1]
    places = ("--set", "places=[inside]", "--set", "contrasts_hu=[[-80, -50]]")
    allowed = study("--allow-training-cases", *places, healthy=world.btcv)
    assert allowed.code == 0, allowed.err
    assert "trained on some" in report_of(allowed)["warnings"][0]
    assert "trained on some" in allowed.answer["notices"][0]


def test_a_model_whose_training_nobody_knows_is_refused(
    world: Any, model: Path, cli: Cli, tmp_path: Path, study: Callable[..., Any]
) -> None:
    del study
    options = ("--model", model, "--name", "judged", "--out", tmp_path, "--json")
    evaluated = cli("liver", "evaluate", world.config, *options)
    assert evaluated.code == 0, evaluated.err
    folder = Path(evaluated.answer["run_folder"])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["inputs"] = [row for row in manifest["inputs"] if row["use"] != "train"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    ran = cli("liver", "sensitivity", folder, "--healthy", world.root / "healthy", "-o", tmp_path / "out", *SMALL)
    assert ran.code == 2
    assert "names no training scan" in ran.err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--set", "settings.preprocess.slice_px=128"), "differs from what the model"),
        (("--set", "settings.train_data.root=x"), "those of `healthy`"),
        (("--set", "overlap=2"), "overlap"),
        (("--set", "healthy=5", "--set", "healthy.layout=lits"), "is not a group of settings"),
    ],
)
def test_wrong_values_are_one_line(study: Callable[..., Any], options: tuple[str, ...], rule: str) -> None:
    ran = study(*options)
    assert ran.code == 2
    assert rule in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_a_dry_run_makes_nothing(study: Callable[..., Any], finished: Any) -> None:
    del finished
    ran = study("--dry-run", "--set", "seed=3")
    assert ran.code == 0, ran.err
    rows = [row for row in ran.answer["plan"] if row["step"] == "sensitivity"]
    assert len(rows) == 4
    assert {row["status"] for row in rows} == {"make"}


def ref(step: str, digest: str = "a") -> Ref:
    return Ref(step=step, key=digest * 64, digest=digest * 64, path=f"{step}/{digest}")


@pytest.mark.usefixtures("cache")
def test_what_a_volume_depends_on(tmp_path: Path) -> None:
    scan, label = tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"
    scan.write_bytes(b"scan")
    label.write_bytes(b"label")
    study = SensitivitySettings(healthy=DatasetSettings(root="/share/doe_jane", layout="btcv"))
    case = LabelledScan(scan, label, (6,), None)
    model = Model((Member(ref("restoration"), ref("segmentation")),))
    segmenter = Segmenter(PreprocessSettings(), model, InferenceSettings(), PostprocessSettings())
    first, second = study.volumes()[:2]

    def call(
        insertion: InsertionSettings = first,
        measure: MeasureSettings = study.measure_settings,
        healthy: Ref | None = None,
        machine: MachineSettings = ANY_MACHINE,
        **segmented: Any,
    ) -> Call:
        by = replace(segmenter, **segmented)
        return steps.measure(case, insertion, measure, healthy or ref("segment"), by, machine)

    same = [call(machine=study.machine), call(inference=InferenceSettings(batch_size=3))]
    other = [
        call(insertion=second),
        call(measure=study.measure_settings.model_copy(update={"overlap": 0.2})),
        call(healthy=ref("segment", "b")),
        call(model=Model((Member(ref("restoration", "b"), ref("segmentation")),))),
        call(model=replace(model, calibration=ref("calibration"))),
        call(preprocess=PreprocessSettings(slice_px=64)),
    ]
    key = content_key(call().parts())
    assert {content_key(one.parts()) for one in same} == {key}
    assert len({key, *(content_key(one.parts()) for one in other)}) == 1 + len(other)
    assert "doe_jane" not in str(call().parts())
    assert str(tmp_path) not in str(call().parts())
    results = [VolumeResult("case-1", ref("sensitivity"))]
    reports = [
        steps.sensitivity_report(study, results, trained_on, (), {}, (), named=named)
        for trained_on in (frozenset[str](), None, frozenset({"case-1"}))
        for named in (True, False)
    ]
    assert len({content_key(one.parts()) for one in reports}) == 6


@pytest.mark.parametrize("step", [steps.MEASURE, steps.SENSITIVITY_REPORT], ids=lambda step: step.name)
def test_steps_name_functions_that_exist(step: Step) -> None:
    assert len(closure(step.function)) > 1


def test_no_folder_reaches_prefect() -> None:
    secret = "/share/doe_jane"
    healthy = {"root": secret, "layout": "folder", "images": "doe_jane/*.nii", "labels": "l/*", "liver_labels": [1]}
    study = SensitivitySettings.model_validate({"healthy": healthy | {"cases": ["doe_jane"]}})
    assert "doe_jane" not in study.model_dump_json()
    assert study.healthy.root == secret
