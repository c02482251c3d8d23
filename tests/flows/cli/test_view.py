"""`adflows liver view`: the page of a segmented case, from the run folder and the register."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medad.ct.io import write_hu, write_mask
from tests.medad.organ.torso import Torso
from tests.medad.trained_runs import trained

Cli = Callable[..., Any]


@pytest.mark.usefixtures("cache", "no_totalsegmentator")
def test_a_page_is_written_into_the_run(cli: Cli, torso: Torso, tmp_path: Path) -> None:
    scan, liver, run = tmp_path / "MUSTERMANN.nii.gz", tmp_path / "liver.nii.gz", tmp_path / "run"
    write_hu(scan, torso.hu, torso.geometry)
    write_mask(liver, torso.liver, torso.geometry)
    ran = cli("liver", "segment", scan, "--liver", liver, "--model", trained(tmp_path / "tiny"), "--out", run)
    assert ran.code == 0, ran.err
    [mask] = (run / "masks").iterdir()
    case = mask.name.removesuffix(".nii.gz")
    viewed = cli("liver", "view", run)
    assert viewed.code == 0, viewed.err
    page = run / "cases" / f"{case}.html"
    assert viewed.out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    assert "MUSTERMANN" not in text
    assert f"<h1>{case}</h1>" in text
    assert "show-truth" not in text.split("<script")[0]
    with_truth = cli("liver", "view", run, case, "--label", liver, "--liver-label", 1, "--tumour-label", 1)
    assert with_truth.code == 0, with_truth.err
    assert "slices where prediction and ground truth differ" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_shown_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "run" / "masks").mkdir(parents=True)
    assert cli("liver", "view", tmp_path / "run").err.endswith("it has no masks/*.nii.gz\n")
    for name in ("ct-1", "ct-2"):
        (tmp_path / "run" / "masks" / f"{name}.nii.gz").write_bytes(b"")
    several = cli("liver", "view", tmp_path / "run")
    assert several.code == 2
    assert "it has 2 cases; name one of ct-1, ct-2" in several.err
    missing = cli("liver", "view", tmp_path / "run", "ct-3")
    assert "no such file; is it a case of this run?" in missing.err
