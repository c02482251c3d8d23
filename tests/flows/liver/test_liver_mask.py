"""`adflows liver mask`, and `segment` without a liver mask, on a torso by construction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medad.ct.io import read_labels, write_hu, write_mask
from medad.organ.refine import dice
from tests.medad.organ.torso import Torso
from tests.medad.trained_runs import trained

Cli = Callable[..., Any]
NAME = "miller-anna"


@pytest.fixture
def scan(tmp_path: Path, torso: Torso, no_totalsegmentator: None) -> Path:
    """Write the torso under a patient's name. No TotalSegmentator is found."""
    write_hu(tmp_path / f"{NAME}.nii.gz", torso.hu, torso.geometry)
    return tmp_path / f"{NAME}.nii.gz"


@pytest.mark.usefixtures("cache")
def test_mask_writes_the_liver(cli: Cli, scan: Path, tmp_path: Path, torso: Torso) -> None:
    ran = cli("liver", "mask", scan, "-o", tmp_path / "liver.nii.gz", "--json")
    assert ran.code == 0, ran.err
    assert dice(read_labels(tmp_path / "liver.nii.gz").values == 1, torso.liver) > 0.9
    assert ran.answer["method"] == "built-in"
    assert 0.8 < ran.answer["sureness"] <= 1
    again = cli("liver", "mask", scan, "-o", tmp_path / "again.nii.gz")
    assert "built-in, sureness 0.9" in again.out
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "liver.nii.gz").read_bytes()


@pytest.mark.usefixtures("cache")
def test_a_scan_without_liver_is_refused_in_one_line(cli: Cli, tmp_path: Path, torso: Torso) -> None:
    empty = np.full_like(torso.hu, -1000)
    empty[20:60, 20:50] = 0
    write_hu(tmp_path / "water.nii.gz", empty, torso.geometry)
    ran = cli("liver", "mask", tmp_path / "water.nii.gz", "-o", tmp_path / "liver.nii.gz")
    assert ran.code == 2
    [line] = [line for line in ran.err.splitlines() if "--liver MASK" in line]
    assert "liver" in line
    assert not (tmp_path / "liver.nii.gz").exists()


@pytest.mark.usefixtures("cache")
def test_segment_finds_the_liver_itself(cli: Cli, scan: Path, tmp_path: Path, torso: Torso) -> None:
    model, out = trained(tmp_path / "tiny"), tmp_path / "out"
    ran = cli("liver", "segment", scan, "--liver", "auto", "--model", model, "--out", out, "--json")
    assert ran.code == 0, ran.err
    [mask] = (out / "liver_masks").iterdir()
    assert mask.name.startswith("ct-")
    assert dice(read_labels(mask).values == 1, torso.liver) > 0.9
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "the liver mask was made automatically (built-in, sureness 0.9" in report
    assert NAME not in report + (out / "report.json").read_text(encoding="utf-8")

    # a corrected mask goes back in, and is not written again
    corrected = cli("liver", "segment", scan, "--liver", mask, "--model", model, "--out", tmp_path / "second", "--json")
    assert corrected.code == 0, corrected.err
    assert not (tmp_path / "second" / "liver_masks").exists()
    found = [json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in (out, tmp_path / "second")]
    assert found[0]["cases"] == found[1]["cases"]


@pytest.mark.usefixtures("cache")
def test_a_given_mask_is_only_warned_about(cli: Cli, scan: Path, tmp_path: Path, torso: Torso) -> None:
    write_mask(tmp_path / "stomach.nii.gz", torso.organs["stomach"] & (torso.hu > -90), torso.geometry)
    model, out = trained(tmp_path / "tiny"), tmp_path / "out"
    ran = cli("liver", "segment", scan, "--liver", tmp_path / "stomach.nii.gz", "--model", model, "--out", out)
    assert ran.code == 0, ran.err
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "the given liver mask looks unusual" in report
    assert "on the patient&#39;s left" in report


@pytest.mark.usefixtures("cache")
def test_a_missing_network_is_named(cli: Cli, scan: Path, tmp_path: Path) -> None:
    ran = cli("liver", "mask", scan, "-o", tmp_path / "l.nii.gz", "--liver-model", tmp_path / "none.ts")
    assert ran.code == 2
    assert "none.ts: no such file or folder" in ran.err
