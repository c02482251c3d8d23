"""The run folder: it is complete or absent, and no file of the user is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from flows.liver import run_folder as liver_folder
from flows.liver.run_folder import settings_of_run
from flows.runs import run_folder as publish
from flows.runs.headline import Figure, read_headline
from flows.runs.run_folder import RunFolder
from flows.runs.runner import LocalRunner, Runner
from flows.store.artifacts import ArtifactStore
from flows.store.references import Ref
from flows.store.step import load_steps
from medad.base.errors import ConfigError, DiskFullError
from medad.config.liver import DatasetSettings, LiverSettings
from medad.steps.results import Member, Model
from medad.steps.trained import NETS

SETTINGS = LiverSettings(
    name="x",
    train_data=DatasetSettings(root="/share/MUSTERMANN", layout="btcv"),
    test_data=DatasetSettings(root="samples:dicom", layout="lits"),
)


def make(name: str, files: dict[str, str]) -> Ref:
    def body(out: Path) -> None:
        for file, text in files.items():
            (out / file).write_text(text, encoding="utf-8")

    return ArtifactStore().build(load_steps("flows.liver")[name], {"files": files}, body)[0]


def a_run(path: Path, report: str = "report") -> RunFolder:
    figures = {"micro_dice_2d": ("Dice", 0.5), "dice_3d_mean": ("3-D Dice", None)}
    headline = [{"key": key, "title": title, "value": value} for key, (title, value) in figures.items()]
    summary = json.dumps({"headline": headline})
    restoration, segmentation = (make(net, {"model.safetensors": net, "curve.json": "{}"}) for net in NETS)
    model = Model((Member(restoration, segmentation),))
    return RunFolder(
        path=path,
        settings=SETTINGS,
        copies=liver_folder.copies(make("report", {"report.html": report, "report.json": summary}), (), model),
        manifest=lambda: liver_folder.manifest((), model),
        seconds=1.0,
    )


@pytest.fixture
def runner(cache: Path) -> Runner:
    return LocalRunner()


def test_headline_figures_are_the_reports(runner: Runner, tmp_path: Path) -> None:
    headline = publish.publish_run_folder(a_run(tmp_path / "runs" / "x"), runner)
    assert headline == {"micro_dice_2d": Figure("Dice", 0.5), "dice_3d_mean": Figure("3-D Dice", None)}
    assert read_headline(tmp_path) == {}


def test_a_second_run_replaces_what_the_first_wrote_and_nothing_else(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    publish.publish_run_folder(a_run(folder, "first"), runner)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("keep", encoding="utf-8")
    publish.publish_run_folder(a_run(folder, "second"), runner)
    assert (folder / "report.html").read_text(encoding="utf-8") == "second"
    assert (folder / "notes" / "mine.txt").read_text(encoding="utf-8") == "keep"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["x"]


def test_a_file_the_second_run_does_not_make_is_gone(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    first = a_run(folder)
    publish.publish_run_folder(first, runner)
    assert (folder / "model" / "restoration" / "model.safetensors").is_file()
    kept = tuple(each for each in first.copies if not each.target.startswith("model/restoration/"))
    publish.publish_run_folder(replace(first, copies=kept), runner)
    assert not (folder / "model" / "restoration").exists()


def test_a_disk_that_fills_leaves_the_earlier_run_whole(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    publish.publish_run_folder(a_run(folder, "first"), runner)
    run = a_run(folder, "second")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DiskFullError):
        publish.publish_run_folder(run, runner)
    assert (folder / "report.html").read_text(encoding="utf-8") == "first"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["x"]


def test_a_publisher_killed_between_its_two_moves_lost_nothing(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    publish.publish_run_folder(a_run(folder, "first"), runner)
    (folder / "mine.txt").write_text("keep", encoding="utf-8")
    folder.rename(tmp_path / ".x.old")
    publish.publish_run_folder(a_run(folder, "second"), runner)
    assert (folder / "report.html").read_text(encoding="utf-8") == "second"
    assert (folder / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_an_edit_in_the_run_folder_does_not_reach_the_cache(runner: Runner, tmp_path: Path) -> None:
    run = a_run(tmp_path / "x")
    publish.publish_run_folder(run, runner)
    (tmp_path / "x" / "report.html").write_text("edited", encoding="utf-8")
    ArtifactStore().verify(run.copies[0].ref)


def test_settings_come_back_without_the_data_folders(runner: Runner, tmp_path: Path) -> None:
    publish.publish_run_folder(a_run(tmp_path / "x"), runner)
    assert "MUSTERMANN" not in (tmp_path / "x" / "manifest.json").read_text(encoding="utf-8")
    settings = settings_of_run(tmp_path / "x")
    assert settings.preprocess == SETTINGS.preprocess
    assert settings.test_data.root == "samples:dicom"


def test_a_folder_that_is_no_run_is_refused(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        settings_of_run(tmp_path)
    publish.publish_run_folder(a_run(tmp_path / "x"), runner)
    (tmp_path / "x" / "model" / "segmentation" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="segmentation"):
        settings_of_run(tmp_path / "x")


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[3]
    commit = publish.git_commit()
    if not (root / ".git").exists():
        assert commit is None
        return
    wanted = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert commit is not None
    assert commit["commit"] == wanted.stdout.strip()
