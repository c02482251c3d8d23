"""The page of all runs: each run's row, and what is not a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.runs.run_folder import RunFolder, publish_run_folder
from flows.runs.runner import LocalRunner
from flows.runs.runs_page import root_of, write_runs_page
from tests.page import Page

HOSTILE = "<script>alert(1)</script> & 'x'"


def add_run(root: Path, flow: str, name: str, *, failures: int = 0, dice: float | None = None, **report: Any) -> None:
    folder = root / flow / name
    folder.mkdir(parents=True)
    headline = [] if dice is None else [{"key": "micro_dice_2d", "title": "micro 2-D Dice", "value": dice}]
    failed = [{"case": f"ct-{number}", "stage": "prepare", "rule": "x"} for number in range(failures)]
    manifest = {"created": f"2026-11-0{1 + failures}T10:20:30+00:00", "seconds": 75.0, "failures": failed}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report | {"headline": headline}), encoding="utf-8")
    (folder / "report.html").write_text("x", encoding="utf-8")


def page_of(root: Path) -> Page:
    write_runs_page(root)
    return Page((root / "index.html").read_text(encoding="utf-8"))


def test_each_run_has_a_row_with_its_figures(tmp_path: Path) -> None:
    add_run(tmp_path, "liver", "first", dice=0.7639, cases=[{}, {}])
    add_run(tmp_path, "liver", HOSTILE.replace("/", "_"), failures=2)
    add_run(tmp_path, "zsad", "screws", categories=[{"name": "screw", "images": [1, 2, 3]}])
    add_run(tmp_path, "zsad-compare", "all", systems=[{"name": "musc"}])
    (tmp_path / "liver" / ".next.new").mkdir()
    (tmp_path / "liver" / "notes").mkdir()
    (tmp_path / "zsad" / "broken").mkdir()
    (tmp_path / "zsad" / "broken" / "manifest.json").write_text("{", encoding="utf-8")
    page = page_of(tmp_path)
    assert "4 runs in this folder" in page.words
    assert "first liver 2026-11-01 10:20 2 cases done 0.764 1 min 15 s" in page.words
    assert "2026-11-03 10:20 2 failed" in page.words
    assert "screws zsad 2026-11-01 10:20 screw: 3 images done" in page.words
    assert "all zsad-compare" in page.words
    assert page.words.index("2 failed") < page.words.index("first"), "the latest comes first"
    assert "micro 2-D Dice" in " ".join(page.labels)
    assert "liver/first/report.html" in page.links
    assert all(link.endswith("report.html") for link in page.links)
    assert len(page.scripts) == 1, "names are no code"


def test_a_folder_without_runs(tmp_path: Path) -> None:
    assert "No run has ended yet." in page_of(tmp_path).words


@pytest.mark.usefixtures("cache")
def test_a_run_writes_the_page_only_where_runs_lie(tmp_path: Path) -> None:
    for path in (tmp_path / "runs" / "liver" / "one", tmp_path / "segmented"):
        publish_run_folder(RunFolder(path, _named("one"), (), dict, 1.0), LocalRunner())
    assert "one liver" in Page((tmp_path / "runs" / "index.html").read_text(encoding="utf-8")).words
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".html") == []
    assert root_of(tmp_path / "segmented") is None


def _named(name: str) -> Any:
    from medad.config.liver import LiverSettings

    data = {"root": "samples:chest", "layout": "lits"}
    return LiverSettings.model_validate({"name": name, "train_data": data, "test_data": data})
