"""The scripts of docs/examples run as they are, and what they print agrees with what they write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label

from medad.cohort.phantom import write_lits_phantoms
from tests.medad.trained_runs import write_run

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(name: str, folder: Path) -> str:
    """Run an example in a folder, without encoders of this machine, and return what it prints."""
    environment = os.environ | {"ADFLOWS_MODELS": str(folder / "models"), "HF_HUB_CACHE": str(folder / "hub")}
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder, env=environment | {"PYTHONPATH": str(EXAMPLES.parents[1])}, capture_output=True, encoding="utf-8",
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"images", "liver"}


@pytest.mark.slow
def test_liver_compares_its_mask_with_the_ground_truth(tmp_path: Path) -> None:
    """The model has random weights, so only the agreement of figures, files and picture is known beforehand."""
    model = write_run(tmp_path / "runs" / "liver" / "demo")
    [scan] = write_lits_phantoms(tmp_path, 1)
    case = model / "inserted" / "lits-0"
    case.mkdir(parents=True)
    scan.rename(case / "scan.nii.gz")
    (tmp_path / "segmentation-0.nii.gz").rename(case / "label.nii.gz")
    printed = run("liver", tmp_path)
    truth = np.asarray(nibabel.load(case / "label.nii.gz").dataobj) == 2
    mask = np.asarray(nibabel.load(tmp_path / "out/liver/mask.nii.gz").dataobj) > 0
    dice = 2 * np.count_nonzero(mask & truth) / (np.count_nonzero(mask) + np.count_nonzero(truth))
    parts, count = label(truth, np.ones((3, 3, 3)))
    hits = len(set(parts[mask].tolist()) - {0})
    assert f"Dice {dice:.2f}; {hits} of {count} inserted lesions found" in printed
    with Image.open(tmp_path / "out/liver/slice.png") as picture:
        assert picture.size == (1440, 528)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000, (
            "a picture, not an empty page"
        )


@pytest.mark.slow
def test_images_ranks_the_images_that_it_wrote(tmp_path: Path) -> None:
    printed = run("images", tmp_path)
    rows = re.findall(r"^(\d\d)\.png: ([0-9.]+)$", printed, re.MULTILINE)
    scores = [float(score) for _, score in rows]
    assert len(rows) == 5
    assert scores == sorted(scores, reverse=True)
    assert {path.stem for path in (tmp_path / "out/images/brick").iterdir()} == {f"{n:02d}" for n in range(16)}
    with Image.open(tmp_path / "out/images/most_anomalous.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
