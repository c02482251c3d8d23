"""A run with members that is killed while it trains a classifier, and run again: nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medad.classifier.model import load_classifier, parse_trees

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
STEP = {"epochs": 1, "steps": 1}
IN_HU: dict[str, Any] = {
    "preprocess": {"slice_px": 64, "equalise": False, "standardise": "median"},
    "synthesis": {"kind": "solid_lesions", "solid": {"copies": 2}},
    "classifier": {"trees": 60, "voxels": 400},
    "inference": {"combine": {"scale": "logit", "segmentation": 0.5, "classifier": 0.5}},
    "train": {"members": 2, "restoration": STEP, "segmentation": STEP},
    "postprocess": {"threshold": "calibrated"},
}
KILLED = """
import os, signal
from medad.classifier import training
write = training.write_bytes
def killing(path, content):
    write(path, content)
    os.kill(os.getpid(), signal.SIGKILL)
training.write_bytes = killing
from flows.__main__ import main
main()
"""
"""Program of a run that ends as soon as the first trees of a classifier are stored."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    world = new_world(tmp_path_factory.mktemp("killed"), train=2, test=1)
    values = yaml.safe_load(world.config.read_text(encoding="utf-8")) | IN_HU
    world.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return world


def _go(world: Any, root: Path, *program: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "ADFLOWS_LOCAL": "1",
        "ADFLOWS_CACHE": str(root / "cache"),
        "ADFLOWS_SLOTS": str(root / "slots"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *program, "liver", "run", str(world.config), "--out", str(root / "runs"), "--json"]
    return subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600, check=False
    )


def _straight(world: Any, root: Path) -> dict[str, Any]:
    done = _go(world, root, "-m", "flows")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_killed_classifier_resumes_and_a_second_run_computes_nothing(world: Any, tmp_path: Path) -> None:
    straight = _straight(world, tmp_path / "straight")
    killed = tmp_path / "killed"
    done = _go(world, killed, "-c", KILLED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [checkpoint] = (killed / "cache" / "checkpoints").glob("classifier-*")
    assert parse_trees(checkpoint.read_text(encoding="ascii")).num_trees() == 25
    again = _straight(world, killed)
    assert again["cached"] > 0
    assert again["cached"] + again["computed"] == straight["computed"]
    assert not list((killed / "cache" / "checkpoints").iterdir())
    for number in (1, 2):
        one, two = (Path(run["run_folder"]) / "model" / f"member-{number}" / "classifier" for run in (straight, again))
        assert load_classifier(one).num_trees() == IN_HU["classifier"]["trees"]
        assert (one / "classifier.txt").read_bytes() == (two / "classifier.txt").read_bytes()
    calibrations = [Path(run["run_folder"]) / "model" / "calibration.json" for run in (straight, again)]
    assert calibrations[0].read_bytes() == calibrations[1].read_bytes()
    assert again["headline"] == straight["headline"]
    second = _straight(world, killed)
    assert (second["computed"], second["cached"]) == (0, straight["computed"])
