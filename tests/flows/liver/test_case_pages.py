"""The pages of cases: which flows write them, what links to them, and what a page that fails costs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medad.base.errors import InputError
from tests.medad.trained_runs import trained

Cli = Callable[..., Any]
CASES = ("lits-0", "lits-1")
PAGES = ("--set", "viewer=true")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    return new_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def cached(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOWS_CACHE", str(world.cache))


def links(run: Path) -> set[str]:
    return set(re.findall(r'href="(cases/[^"#]+)', (run / "report.html").read_text(encoding="utf-8")))


def test_each_case_has_a_page_that_the_report_links_to(cli: Cli, world: Any) -> None:
    ran = cli("liver", "run", world.config, "--out", world.runs, "--json", *PAGES)
    assert (ran.code, ran.answer["failures"]) == (0, []), ran.err
    run = Path(ran.answer["run_folder"])
    assert {path.name for path in (run / "cases").iterdir()} == {f"{case}.html" for case in CASES}
    assert links(run) == {f"cases/{case}.html" for case in CASES}
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert [case["page"] for case in report["cases"]] == [f"cases/{case}.html" for case in CASES]
    for case in CASES:
        page = (run / "cases" / f"{case}.html").read_text(encoding="utf-8")
        assert f"<h1>{case}</h1>" in page
        assert 'href="../report.html"' in page
        assert "slices where prediction and ground truth differ" in page, "the label is the ground truth"
        assert page.count('<img src="data:image/jpeg') == len(report["cases"][CASES.index(case)]["shown_slices"])
    again = cli("liver", "run", world.config, "--out", world.runs, "--json", *PAGES)
    assert again.answer["computed"] == 0
    without = cli("liver", "run", world.config, "--out", world.runs, "--name", "bare", "--json", *PAGES, "--no-viewer")
    bare = Path(without.answer["run_folder"])
    assert not (bare / "cases").exists()
    assert links(bare) == set()


def test_a_page_that_fails_costs_nothing_else(cli: Cli, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from medad.reports.viewer import page

    write = page.write_case_page

    def fail(case: Any, case_id: str, *rest: Any, **options: Any) -> None:
        if case_id == CASES[0]:
            raise InputError(case.scan, "it was moved away")
        write(case, case_id, *rest, **options)

    monkeypatch.setattr(page, "write_case_page", fail)
    ran = cli("liver", "run", world.config, "--out", world.runs, "--name", "half", "--json", "--refresh", *PAGES)
    assert ran.code == 2
    [failure] = ran.answer["failures"]
    assert (failure["case"], failure["stage"], failure["rule"]) == (CASES[0], "case-page", "it was moved away")
    run = Path(ran.answer["run_folder"])
    assert {path.name for path in (run / "masks").iterdir()} == {f"{case}.nii.gz" for case in CASES}
    assert links(run) == {f"cases/{CASES[1]}.html"}
    assert "it was moved away" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_totalsegmentator")
def test_pages_of_segmented_scans_have_pseudonyms(cli: Cli, world: Any, tmp_path: Path) -> None:
    scan, liver = tmp_path / "MUSTERMANN.nii", tmp_path / "MUSTERMANN-liver.nii"
    (tmp_path / "run").mkdir()
    scan.write_bytes((world.lits / "volume-0.nii.gz").read_bytes())
    liver.write_bytes((world.lits / "segmentation-0.nii.gz").read_bytes())
    scan, liver = scan.rename(f"{scan}.gz"), liver.rename(f"{liver}.gz")
    out = tmp_path / "found"
    model = trained(tmp_path / "tiny")
    options = ("--liver", liver, "--liver-label", 1, "--model", model, "--names", "original", "--out", out)
    ran = cli("liver", "segment", scan, *options, *PAGES)
    assert ran.code == 0, ran.err
    [mask], [page] = (list((out / folder).iterdir()) for folder in ("masks", "cases"))
    assert mask.name == "MUSTERMANN.nii.gz", "the user asked for these names"
    assert re.fullmatch(r"ct-[0-9a-f]+\.html", page.name), "the report links to it, so it has the pseudonym"
    assert links(out) == {f"cases/{page.name}"}
    assert "MUSTERMANN" not in page.read_text(encoding="utf-8")
