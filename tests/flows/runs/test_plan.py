"""Dry runs of both flows: the plan says what a run then does, and nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.runs.plan import PlannedCall, PlanRunner
from flows.runs.runner import LocalRunner, new_runner, use_runner
from flows.store.upkeep import Change
from medad.base.settings import ANY_MACHINE

Cli = Callable[..., Any]
LIVER_STEPS = {"prepare": 4, "restoration": 1, "segmentation": 1, "segment": 2, "evaluate": 2, "report": 1}
ZSAD_STEPS = {"zsad-text": 2, "zsad-encode": 2, "zsad-system": 4, "zsad-evaluate": 4, "zsad-report": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    return new_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, new_images: Callable[..., Any]) -> Any:
    return new_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(world: Any, images: Any, cli: Cli) -> Iterator[None]:
    """Run both flows into one cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        for field, where in (("liver", world), ("zsad", images)):
            ran = cli(field, "run", where.config, "--out", where.runs, "--json")
            assert ran.code == 0, ran.err
        yield


def plan_of(ran: Any) -> list[dict[str, str]]:
    assert ran.code == 0, ran.err
    assert ran.answer["computed"] == ran.answer["cached"] == 0
    rows: list[dict[str, str]] = ran.answer["plan"]
    return rows


def steps(rows: list[dict[str, str]], status: str) -> set[str]:
    return {row["step"] for row in rows if row["status"] == status}


def files(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_on_an_empty_cache_all_is_to_make_or_waits_and_nothing_is_written(
    world: Any, images: Any, cli: Cli, cache: Path, tmp_path: Path
) -> None:
    for field, where, wanted, first in (
        ("liver", world, LIVER_STEPS, {"prepare"}),
        ("zsad", images, ZSAD_STEPS, {"zsad-text", "zsad-encode"}),
    ):
        rows = plan_of(cli(field, "run", where.config, "--out", tmp_path / "runs", "--json", "--dry-run"))
        assert Counter(row["step"] for row in rows) == wanted
        assert steps(rows, "cached") == set()
        assert steps(rows, "make") == first
        assert {row["reason"] for row in rows if row["status"] == "make"} == {"nothing of this step is cached"}
    left = {path.relative_to(tmp_path).parts[:2] for path in files(tmp_path)}
    assert left <= {("cache", "digests.sqlite")}  # digests of files may be stored, but no other file


def test_what_a_run_made_is_cached_and_refresh_makes_it_again(
    world: Any, images: Any, finished: None, cli: Cli
) -> None:
    for field, where, wanted in (("liver", world, LIVER_STEPS), ("zsad", images, ZSAD_STEPS)):
        before = files(where.runs)
        rows = plan_of(cli(field, "run", where.config, "--out", where.runs, "--json", "--dry-run"))
        assert steps(rows, "cached") == set(wanted)
        assert len(rows) == sum(wanted.values())
        assert all(row["status"] == "cached" for row in rows)
        rows = plan_of(cli(field, "run", where.config, "--out", where.runs, "--json", "--dry-run", "--refresh"))
        assert steps(rows, "cached") == set()
        assert "--refresh" in {row["reason"] for row in rows}
        assert files(where.runs) == before


@pytest.mark.parametrize(
    ("field", "setting", "made", "part"),
    [
        ("liver", "postprocess.min_lesion_mm3=7", {"segment"}, "inputs.post.min_lesion_mm3: 0.0 -> 7.0"),
        ("liver", "seed=3", {"restoration"}, "inputs.settings.seed: 0 -> 3"),
        ("zsad", "method.tau=0.5", {"zsad-system"}, "inputs.system.score.tau: 0.07 -> 0.5"),
        ("zsad", "evaluation.max_fpr=0.2", {"zsad-evaluate"}, "inputs.settings.max_fpr: 0.3 -> 0.2"),
    ],
)
def test_the_reason_names_the_setting_and_a_run_then_makes_just_that(
    world: Any,
    images: Any,
    finished: None,
    cli: Cli,
    tmp_path: Path,
    field: str,
    setting: str,
    made: set[str],
    part: str,
) -> None:
    command = [field, "run", (world if field == "liver" else images).config, "--out", tmp_path / "runs", "--json"]
    rows = plan_of(cli(*command, "--set", setting, "--dry-run"))
    assert steps(rows, "make") == made
    assert {row["reason"] for row in rows if row["status"] == "make"} == {part}
    ran = cli(*command, "--set", setting)
    count = Counter(row["status"] for row in rows)
    assert ran.answer["cached"] >= count["cached"]
    assert count["make"] <= ran.answer["computed"] <= count["make"] + count["follows"]


def test_a_damaged_artifact_is_to_make(world: Any, finished: None, cli: Cli, tmp_path: Path) -> None:
    damaged = {path: path.read_bytes() for path in (world.cache / "restoration").glob("*/model.safetensors")}
    for path, whole in damaged.items():
        path.write_bytes(whole[:-1])
    try:
        rows = plan_of(cli("liver", "run", world.config, "--out", tmp_path, "--json", "--dry-run"))
    finally:
        for path, whole in damaged.items():
            path.write_bytes(whole)
    assert [row["reason"] for row in rows if row["step"] == "restoration"] == ["the cached artifact is damaged"]


def test_bad_input_is_one_line_and_the_rest_is_planned(world: Any, finished: None, cli: Cli, tmp_path: Path) -> None:
    ran = cli(
        "liver", "run", world.config, "--out", tmp_path, "--json", "--dry-run", "--set", "train_data.root=/nowhere"
    )
    assert ran.code == 2
    assert "/nowhere: " in ran.err.splitlines()[0]
    assert steps(ran.answer["plan"], "cached") == {"prepare"}


def test_every_command_that_runs_has_a_dry_run(world: Any, finished: None, cli: Cli, tmp_path: Path) -> None:
    model = world.runs / "liver" / "tiny"
    scan, label = (world.lits / f"{kind}-0.nii.gz" for kind in ("volume", "segmentation"))
    for command in (
        ("prepare", world.config),
        ("train", world.config, "--out", tmp_path),
        ("evaluate", world.config, "--model", model, "--name", "other", "--out", tmp_path),
        ("segment", scan, "--liver", label, "--model", model, "--out", tmp_path / "out"),
        ("step", "window", scan, "--out", tmp_path / "window.nii.gz"),
    ):
        ran = cli("liver", *command, "--dry-run")
        assert ran.code == 0, ran.err
        assert ran.out.splitlines()[-1].endswith("nothing written")
    assert files(tmp_path) == set()


def test_a_dry_run_marks_no_run_and_ends_with_its_block(cache: Path) -> None:
    with use_runner(PlanRunner):
        assert isinstance(new_runner(ANY_MACHINE, refresh=False), PlanRunner)
    assert not (cache / "runs").exists()
    assert type(new_runner(ANY_MACHINE, refresh=False)) is LocalRunner


def test_lines_say_what_and_why() -> None:
    assert PlannedCall("prepare", "a", "make", "nothing").line == "prepare a: to make: nothing"
    assert PlannedCall("prepare", "a", "cached").line == "prepare a: cached"
    assert PlannedCall("report", "r", "follows", "prepare").line == "report r: waits for prepare"
    assert Change("inputs.low", "1", "2").line == "inputs.low: 1 -> 2"
    assert Change("code", "a" * 64, "b" * 64).line == "code changed"
