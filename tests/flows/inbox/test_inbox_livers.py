"""An inbox without liver masks finds the liver of each scan, on a torso by construction."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.inbox.arrivals import NO_MASK
from flows.inbox.config import InboxRequest
from flows.inbox.flow import liver_inbox
from medad.ct.io import read_labels, write_hu
from medad.organ.refine import dice
from tests.flows.inbox_box import Box, read
from tests.medad.organ.torso import Torso
from tests.medad.trained_runs import trained

Cli = Callable[..., Any]
NAME = "miller-anna"


@pytest.fixture
def box(tmp_path: Path, cli: Cli, cache: Path, no_totalsegmentator: None) -> Box:
    """Create an inbox without `livers`. No TotalSegmentator is found."""
    box = Box(tmp_path / "box", tmp_path, trained(tmp_path / "tiny"), cli)
    box.configure(livers=None, liver_labels=[1])
    return box


def drop_torso(box: Box, torso: Torso) -> Path:
    """Put the torso into the inbox, under a patient's name. Return the scan."""
    folder = box.inbox / NAME
    folder.mkdir()
    write_hu(folder / "scan.nii.gz", torso.hu, torso.geometry)
    return folder / "scan.nii.gz"


def drop_water(box: Box, torso: Torso) -> Path:
    """Put a box of water into the inbox, which has no liver. Return the scan."""
    empty = np.full_like(torso.hu, -1000)
    empty[20:60, 20:50] = 0
    folder = box.inbox / "water"
    folder.mkdir()
    write_hu(folder / "scan.nii.gz", empty, torso.geometry)
    return folder / "scan.nii.gz"


def rows_of(box: Box) -> dict[str, dict[str, str]]:
    """Return the rows of inbox.csv by status."""
    with (box.out / "inbox.csv").open(encoding="utf-8") as table:
        return {row["status"]: row for row in csv.DictReader(table)}


def test_the_liver_is_found_and_its_mask_is_kept(box: Box, torso: Torso, cli: Cli, tmp_path: Path) -> None:
    scan = drop_torso(box, torso)
    planned = box.run("--dry-run")
    assert planned.code == 0, planned.err
    assert {row["step"] for row in planned.answer["plan"]} == {"model", "liver-mask", "prepare", "segment", "report"}
    [case_id] = box.segmented()
    folder = box.out / case_id
    mask = folder / "liver_masks" / f"{case_id}.nii.gz"
    assert dice(read_labels(mask).values == 1, torso.liver) > 0.9
    entry = read(folder / "manifest.json")["inbox"]["liver"]
    row = rows_of(box)["done"]
    assert (row["liver_mask"], float(row["sureness"])) == ("built-in", entry["sureness"])
    assert 0.8 < entry["sureness"] <= 1
    assert (box.overview()["cases"][0]["liver_mask"], entry["method"]) == ("built-in", "built-in")
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{case_id}: the liver mask was made automatically (built-in, sureness 0.9" in report
    written = [path.read_text(encoding="utf-8") for path in box.out.rglob("*.*") if path.suffix in {".json", ".html"}]
    assert not any(NAME in text for text in written)
    assert box.segmented() == []
    [listed] = box.run("--list").answer["scans"]
    assert (listed["scan"], listed["liver"]) == (str(scan), "")

    # the law: `segment` finds the same liver and the same tumours
    ran = cli("liver", "segment", scan, "--model", box.model, "--out", tmp_path / "by-hand", "--json")
    assert ran.code == 0, ran.err
    for name, ours in (("liver_masks", mask), ("masks", folder / "mask.nii.gz")):
        [by_hand] = (tmp_path / "by-hand" / name).iterdir()
        assert by_hand.read_bytes() == ours.read_bytes()


def test_with_a_pattern_a_scan_waits_for_its_mask(box: Box, torso: Torso) -> None:
    box.configure(livers="*/liver.nii.gz")
    drop_torso(box, torso)
    assert box.segmented() == []
    assert box.overview()["waiting"] == [{"rule": NO_MASK, "count": 1}]
    box.configure(livers=None)
    [case_id] = box.segmented()
    assert rows_of(box)["done"]["case"] == case_id


def test_a_refused_mask_fails_its_own_scan_until_another_method_is_used(box: Box, torso: Torso, tmp_path: Path) -> None:
    water = drop_water(box, torso)
    drop_torso(box, torso)
    ran = box.run()
    assert (ran.code, len(ran.answer["segmented"])) == (2, 1)
    [line] = [line for line in ran.err.splitlines() if "--liver MASK" in line]
    assert str(water) in line
    [(case_id, first)] = box.failures().items()
    assert first["stage"] == "liver-mask"
    assert "liver" in first["rule"]
    row = rows_of(box)["failed"]
    assert (row["case"], row["liver_mask"], row["sureness"]) == (case_id, "", "")
    again = box.run()
    assert (again.code, again.answer["failures"]) == (0, [])

    # another method is another try, and so is another network under the same name
    tried = {first["tried_with"]}
    for content in (b"no network", b"neither"):
        (tmp_path / "net.ts").write_bytes(content)
        box.configure(liver_model=str(tmp_path / "net.ts"), trust_liver_model=True)
        assert box.segmented(code=2) == []
        [failure] = box.failures().values()
        assert "cannot be loaded as a network" in failure["rule"]
        assert failure["tried_with"] not in tried
        tried.add(failure["tried_with"])
        assert box.segmented() == []


def test_a_missing_network_is_a_failed_run_with_one_line(box: Box, torso: Torso, tmp_path: Path) -> None:
    drop_water(box, torso)
    box.configure(liver_model=str(tmp_path / "none.ts"))
    ran = box.run()
    assert ran.code == 2
    [line] = ran.err.splitlines()
    assert "none.ts: no such file or folder" in line
    assert not box.out.exists()


def test_a_program_is_not_loaded_without_leave(box: Box, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "net.ts").write_bytes(b"a program")
    box.configure(liver_model=str(tmp_path / "net.ts"))
    for command in (
        ("liver", "inbox", box.config),
        ("liver", "mask", tmp_path / "scan.nii.gz", "-o", tmp_path, "--liver-model", tmp_path / "net.ts"),
    ):
        ran = cli(*command)
        assert ran.code == 2
        assert f"{tmp_path / 'net.ts'}: a TorchScript file is a program" in ran.err
        assert len(ran.err.splitlines()) <= 2


def test_prefect_shows_neither_name_nor_path(box: Box, torso: Torso, tmp_path: Path, prefect_server: str) -> None:
    del prefect_server
    drop_water(box, torso)
    state: Any = liver_inbox.prefect(InboxRequest(config=str(box.config)), return_state=True)
    assert (state.name, state.message) == ("CompletedWithFailures", "1 failed: see failed/")
    box.configure(liver_model=str(tmp_path / NAME))
    state = liver_inbox.prefect(InboxRequest(config=str(box.config)), return_state=True)
    assert state.is_failed()
    assert NAME not in state.message
    assert str(tmp_path) not in state.message
    assert json.dumps(box.failures()).count(NAME) == 0
