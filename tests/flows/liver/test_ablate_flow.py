"""The flow liver-ablate on phantoms with two rows and two seeds: shared results, and failures of single rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli.studies import parse_seeds, row_line
from medad.base.errors import ConfigError
from medad.base.text import PLACEHOLDER
from medad.config.ablation import AblationSettings

Cli = Callable[..., Any]
ROWS: list[dict[str, Any]] = [
    {"name": "plain", "label": "Plain"},
    {"name": "faint", "label": "Faint", "set": {"synthesis.shift_grey": [20, 60]}},
]
SWEEP = {"name": "threshold", "label": "Threshold", "key": "synthesis.threshold_grey", "values": [150, 160]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    made = new_world(tmp_path_factory.mktemp("world"), train=1, test=2)
    values = yaml.safe_load(made.config.read_text(encoding="utf-8"))
    values["synthesis"]["threshold_grey"] = 150
    made.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    write(made, "ablation", rows=ROWS)
    return made


def write(world: Any, name: str, **values: Any) -> Path:
    path: Path = world.root / f"{name}.yaml"
    settings = {"name": name, "base": "tiny", "seeds": [0, 1], "panels": 1} | values
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(world: Any, cli: Cli) -> Iterator[Any]:
    """Run the flow once with an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        yield cli("liver", "ablate", world.root / "ablation.yaml", "--out", world.runs, "--json")


@pytest.fixture
def again(finished: Any, world: Any, cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs the flow again, with the same cache, other options and a new run folder."""
    del finished

    def run(*options: object, config: str = "ablation") -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ADFLOWS_CACHE", str(world.cache))
            path = world.root / f"{config}.yaml"
            return cli("liver", "ablate", path, "--out", tmp_path / "runs", "--json", *options)

    return run


def report_of(ran: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    return found


def made(world: Any, step: str) -> int:
    return len(list((world.cache / step).iterdir()))


def test_every_row_is_judged_with_every_seed_on_every_case(finished: Any) -> None:
    assert finished.code == 0, finished.err
    report = report_of(finished)
    for row in report["rows"]:
        assert [one["seed"] for one in row["seeds"]] == [0, 1]
        assert all(len(one["cases"]) == 2 for one in row["seeds"])
        assert row["stats"]["micro_dice_2d"]["n"] == 2
    assert report["baseline"]["row"]["stats"]["voxel_auroc_mean"]["n"] == 1
    assert {part["kind"] for part in report["embedding"]["slices"]} == {"tumour", "healthy", "synthesised"}
    assert report["failures"] == []
    assert [row["row"] for row in finished.answer["rows"]] == ["plain", "faint", "baseline"]


def test_what_rows_share_is_made_once(finished: Any, world: Any) -> None:
    assert made(world, "prepare") == 3, "one training case and two test cases, for all rows and seeds"
    assert made(world, "restoration") == 4
    records = json.loads((Path(finished.answer["run_folder"]) / "manifest.json").read_text(encoding="utf-8"))["tasks"]
    assert len({(record["step"], record["case_id"]) for record in records}) == len(records)
    assert sum(record["step"] == "prepare" for record in records) == 3


def test_a_second_run_computes_nothing(again: Callable[..., Any]) -> None:
    ran = again()
    assert (ran.code, ran.answer["computed"]) == (0, 0)


def test_a_dry_run_makes_nothing(again: Callable[..., Any], tmp_path: Path) -> None:
    ran = again("--dry-run", "--seeds", "3")
    assert ran.code == 0, ran.err
    status = {(row["step"], row["case"]): row["status"] for row in ran.answer["plan"]}
    assert status["restoration", "plain, seed 0: model"] == "cached"
    assert status["restoration", "plain, seed 2: model"] == "make"
    assert status["segmentation", "plain, seed 2: model"] == "follows"
    assert not (tmp_path / "runs" / "liver-ablate" / "ablation").exists()


def test_rows_and_seeds_are_chosen(again: Callable[..., Any]) -> None:
    ran = again("--rows", "faint", "--seeds", "1,")
    assert ran.code == 0, ran.err
    assert ran.answer["computed"] <= 3, "only images and features of seed 1 and the report are new"
    report = report_of(ran)
    assert [(row["name"], len(row["seeds"])) for row in report["rows"]] == [("faint", 1)]
    assert report["rows"][0]["stats"]["micro_dice_2d"]["sd"] is None
    unknown = again("--rows", "bright")
    assert unknown.code == 2
    assert "bright: no such row" in unknown.err


def test_a_row_that_fails_is_listed_and_the_others_go_on(again: Callable[..., Any], world: Any) -> None:
    # all slices are too small for this setting
    broken = {"name": "broken", "label": "Broken", "set": {"preprocess.min_liver_px": 4000}}
    write(world, "with_broken", rows=[broken, *ROWS], reference="plain")
    ran = again(config="with_broken")
    assert ran.code == 2
    report = report_of(ran)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["broken"]["missing_seeds"] == [0, 1]
    assert len(rows["plain"]["seeds"]) == len(rows["faint"]["seeds"]) == 2
    failed = {(one["row"], one["stage"]) for one in report["failures"]}
    assert ("broken", "restoration") in failed
    assert ("", "prepare") in failed, "the preparation is listed without a row"


def test_a_setting_that_does_not_load_ends_it_before_anything_runs(again: Callable[..., Any], world: Any) -> None:
    write(world, "misspelt", rows=[*ROWS, {"name": "odd", "label": "Odd", "set": {"synthesis.elipse_px": 3}}])
    ran = again(config="misspelt")
    assert ran.code == 2
    assert "rows.odd: synthesis.elipse_px: Extra inputs are not permitted" in ran.err
    assert ran.out == ""


def test_a_patient_on_both_sides_ends_every_row_and_is_told_once(again: Callable[..., Any], world: Any) -> None:
    data = {"root": str(world.lits), "layout": "lits"}
    write(world, "leaking", rows=ROWS, set={"train_data": data, "test_data": data})
    ran = again(config="leaking")
    assert ran.code == 2
    report = report_of(ran)
    assert all(row["missing_seeds"] == [0, 1] for row in report["rows"])
    (failure,) = report["failures"]
    assert "no patient may be in both" in failure["rule"]
    records = json.loads((Path(ran.answer["run_folder"]) / "manifest.json").read_text(encoding="utf-8"))["tasks"]
    assert {record["step"] for record in records} == {"ablation"}


@pytest.mark.slow
def test_every_snapshot_of_phase_two_is_judged(again: Callable[..., Any], world: Any) -> None:
    write(world, "long", curve={"epochs": 4, "every": 2}, sweeps=[SWEEP], embedding=False, baseline=False)
    ran = again("--seeds", "1", config="long")
    assert ran.code == 0, ran.err
    report = report_of(ran)
    assert [point["epochs"] for point in report["curve"]["points"]] == [2, 4]
    assert all(point["stats"]["micro_dice_2d"]["n"] == 1 for point in report["curve"]["points"])
    assert [row["name"] for row in report["sweeps"][0]["rows"]] == ["150", "160"]
    assert report["rows"] == []


def test_a_row_that_leaves_tissue_out_prepares_its_test_cases(again: Callable[..., Any], world: Any) -> None:
    rows = [*ROWS[:1], {"name": "cut", "label": "Cut", "set": {"inference.exclude": ["fat", "vessels"]}}]
    write(world, "tissue", rows=rows)
    before = made(world, "prepare"), made(world, "restoration")
    ran = again("--seeds", "0,", config="tissue")
    assert ran.code == 0
    assert (made(world, "prepare"), made(world, "restoration")) == (before[0] + 2, before[1])


def test_seeds_are_a_number_or_a_list() -> None:
    assert (parse_seeds("3"), parse_seeds("4,"), parse_seeds("0, 7")) == ([0, 1, 2], [4], [0, 7])
    for text in ("", "0", "-1", "a", "1,b"):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


def test_a_row_is_a_line() -> None:
    stat = {"mean": 0.5, "sd": None}
    row = {"row": "a", "seeds": 1, "micro_dice_2d": stat, "dice_3d_mean": stat | {"sd": 0.1}, "voxel_auroc_mean": None}
    assert row_line(row).split(maxsplit=1)[1] == (
        "micro Dice 0.500, 3-D Dice 0.500 ± 0.100, voxel AUROC undefined (1 seed)"
    )


def test_no_folder_reaches_prefect() -> None:
    secret = "/home/doe_jane/scans"
    data = {"root": secret, "layout": "folder", "images": "jane/*.nii", "labels": "*.nii", "liver_labels": [1]}
    settings = AblationSettings.model_validate(
        {
            "name": "x",
            "base": {"name": "x", "train_data": data, "test_data": data},
            "set": {"train_data.root": secret},
            "rows": [
                {"name": "a", "label": "A", "set": {"test_data": {"root": secret, "cases": ["doe_jane"]}}},
                {"name": "b", "label": "B", "set": {"synthesis.texture.folder": secret}},
            ],
        }
    )
    text = settings.model_dump_json()
    assert "jane" not in text
    assert PLACEHOLDER in text
    assert settings.rows[0].set["test_data.root"] == secret, "the flow itself gets the real path"
