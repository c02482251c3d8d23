"""Flows that are killed in each phase and run again: nothing is lost, computed twice or left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.devices import slots as gpu
from tests.flows.live_server import HANGS_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[3]
LIVER_STEPS = ("prepare", "restoration", "segmentation", "segment", "evaluate", "report")
ZSAD_STEPS = ("zsad-text", "zsad-encode", "zsad-system", "zsad-evaluate", "zsad-report")
LIVER = [
    *(("making", step) for step in LIVER_STEPS),
    *(("sealing", step) for step in ("prepare", "restoration", "report")),
    ("moving", "segmentation"),
    ("moved", "restoration"),
    ("moved", "segment"),
    *((place, "-") for place in ("copying", "listing", "swapping")),
]
ZSAD = [*(("making", step) for step in ZSAD_STEPS), ("sealing", "zsad-encode"), ("moved", "zsad-system")]


class Runs:
    """One command, killed or not, with a new cache and run folder."""

    def __init__(self, options: list[object], root: Path, server: str) -> None:
        self.options, self.root = options, root
        self.environment = {
            "PREFECT_API_URL": server,
            "ADFLOWS_CACHE": str(root / "cache"),
            "ADFLOWS_SLOTS": str(root / "slots"),
            "PYTHONPATH": str(ROOT),
        }

    def go(self, *program: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *program, *map(str, self.options), "--out", str(self.root / "runs"), "--json"]
        return subprocess.run(
            command, env=os.environ | self.environment, cwd=ROOT, capture_output=True, encoding="utf-8",
            timeout=HANGS_S, check=False,
        )  # fmt: skip

    def straight(self) -> dict[str, Any]:
        done = self.go("-m", "flows")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def killed(self, place: str, step: str) -> None:
        done = self.go(str(ROOT / "tests" / "flows" / "killed_run.py"), place, step)
        assert done.returncode == -signal.SIGKILL, done.stderr

    @property
    def artifacts(self) -> set[Path]:
        # a step that was killed while it moved out of `tmp` is sealed already
        sidecars = (self.root / "cache").glob("*/*/artifact.json")
        return {sidecar.parent for sidecar in sidecars if sidecar.parents[1].name != "tmp"}


def contents(run_folder: str) -> dict[str, str]:
    """Return the digests of a run's files, without the values that measure time."""
    manifest = json.loads((Path(run_folder) / "manifest.json").read_text(encoding="utf-8"))
    names = [name for name in manifest["files"] if not name.endswith(("curve.json", "report.html", "report.json"))]
    return {name: manifest["files"][name]["sha256"] for name in names}


def left_behind(root: Path) -> list[str]:
    found = [str(path) for name in ("tmp", "locks", "checkpoints") for path in (root / "cache" / name).glob("*")]
    return found + [str(path) for path in (root / "runs").rglob(".*")]


def check(place: str, step: str, runs: Runs, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs.killed(place, step)
    whole = runs.artifacts
    if place in {"making", "sealing"}:
        assert list((runs.root / "cache" / "tmp").glob(f"{step}-*")), "it was killed while it worked"
    again = runs.straight()
    assert again["cached"] == len(whole), "complete artifacts are not computed again"
    assert again["computed"] == straight["computed"] - len(whole)
    assert contents(again["run_folder"]) == contents(straight["run_folder"])
    assert left_behind(runs.root) == []
    monkeypatch.setenv("ADFLOWS_SLOTS", str(runs.root / "slots"))
    for name in (gpu.CPU_NAME, gpu.SHORT_STEPS):
        descriptor = gpu.slot_queue().try_lock(name)
        assert descriptor is not None, "the device is free"
        os.close(descriptor)


@pytest.fixture(scope="module")
def liver_world(
    new_world: Callable[..., Any], prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], dict[str, Any]]:
    root = tmp_path_factory.mktemp("liver")
    world = new_world(root, train=1, test=1)
    options: list[object] = ["liver", "run", world.config, "--set", "train.restoration.epochs=3"]
    return options, Runs(options, root / "straight", prefect_server).straight()


@pytest.mark.parametrize(("place", "step"), LIVER)
def test_liver(
    place: str, step: str, liver_world: Any, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, straight = liver_world
    check(place, step, Runs(options, tmp_path, prefect_server), straight, monkeypatch)


@pytest.fixture(scope="module")
def zsad_world(
    new_images: Callable[..., Any], prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], dict[str, Any]]:
    root = tmp_path_factory.mktemp("zsad")
    world = new_images(root)
    options: list[object] = ["zsad", "run", world.config]
    return options, Runs(options, root / "straight", prefect_server).straight()


@pytest.mark.parametrize(("place", "step"), ZSAD)
def test_zsad(
    place: str, step: str, zsad_world: Any, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, straight = zsad_world
    check(place, step, Runs(options, tmp_path, prefect_server), straight, monkeypatch)


def test_a_refresh_that_is_killed_loses_nothing_but_time(
    liver_world: Any, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill between the two moves that replace an old artifact by a new one."""
    options, straight = liver_world
    runs = Runs(options, tmp_path, prefect_server)
    runs.straight()
    refresh = Runs([*options, "--refresh"], tmp_path, prefect_server)
    refresh.killed("moving", "restoration")
    again = runs.straight()
    assert contents(again["run_folder"]) == contents(straight["run_folder"])
    assert again["computed"] == 1, "only the artifact that was being replaced"
    assert left_behind(tmp_path) == []


def test_two_flows_at_once_make_what_both_want_once(liver_world: Any, prefect_server: str, tmp_path: Path) -> None:
    options, straight = liver_world
    runs = Runs(options, tmp_path, prefect_server)
    command = [sys.executable, "-m", "flows"]
    others = [
        subprocess.Popen(
            [*command, "liver", name, str(options[2]), "--set", "train.restoration.epochs=3", "--json", *more],
            env=os.environ | runs.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for name, more in (("prepare", []), ("train", ["--out", str(tmp_path / "trained")]))
    ]  # fmt: skip
    main = runs.straight()
    answers = [main]
    for other in others:
        out, err = other.communicate(timeout=HANGS_S)
        assert other.returncode == 0, err
        answers.append(json.loads(out))
    made = [json.loads((folder / "artifact.json").read_text(encoding="utf-8"))["step"] for folder in runs.artifacts]
    assert sum(answer["computed"] for answer in answers) == len(made)
    assert sorted(made) == sorted(
        ["prepare", "prepare", "restoration", "segmentation", "segment", "evaluate", "report", "report"]
    )
    assert contents(main["run_folder"]) == contents(straight["run_folder"])


def test_a_clock_that_went_back(liver_world: Any, prefect_server: str, tmp_path: Path) -> None:
    """Find inputs and artifacts from the future, as after a battery change. They are complete and not pruned."""
    options, _ = liver_world
    runs = Runs(options, tmp_path, prefect_server)
    first = runs.straight()
    future = 4_000_000_000
    for path in [*(tmp_path / "cache").rglob("*"), *Path(str(options[2])).parent.rglob("*")]:
        os.utime(path, (future, future))
    again = runs.straight()
    assert (again["computed"], again["cached"]) == (0, first["computed"])
    pruned = subprocess.run(
        [sys.executable, "-m", "flows", "cache", "prune", "--older-than", "1d", "--json"],
        env=os.environ | runs.environment, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=HANGS_S, check=True,
    )  # fmt: skip
    assert json.loads(pruned.stdout)["removed"] == []
    assert len(runs.artifacts) == first["computed"]


@pytest.mark.timeout(3600)
def test_a_disk_that_fills_at_any_moment(liver_world: Any, prefect_server: str, tmp_path: Path) -> None:
    """Use real file systems of growing size, so that each write of a run fails first on one of them."""
    options, straight = liver_world
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        runs = Runs(options, small, prefect_server)
        kilobytes, failed = 64, []
        while True:
            done = runs.go("-m", "flows")
            if done.returncode == 0:
                break
            assert done.returncode == 2, done.stderr
            assert "Traceback" not in done.stderr
            assert any(text in done.stderr + done.stdout for text in ("no room left", "No space left")), done.stderr
            for folder in runs.artifacts:
                names = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))["files"]
                assert all((folder / name).is_file() for name in names)
            failed.append(kilobytes)
            kilobytes = int(kilobytes * 1.4)
            assert kilobytes < 20_000
            remount = ["mount", "-o", f"remount,size={kilobytes}k", str(small)]
            subprocess.run(remount, check=True, capture_output=True)
        assert len(failed) > 3, "several different writes failed"
        assert contents(json.loads(done.stdout)["run_folder"]) == contents(straight["run_folder"])
        assert left_behind(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
