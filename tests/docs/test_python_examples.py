"""The Python examples of README.md and docs/reference/python.md, run in a new process without Prefect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medad.cohort.phantom import write_lits_phantoms
from tests.medad.trained_runs import write_run

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
assert not {"prefect", "flows", "typer"} & {name.split(".")[0] for name in sys.modules}
"""
WRITTEN = """
import pathlib, shutil
assert {path.name for path in pathlib.Path("out").iterdir()} == {"mask.nii.gz", "probability.nii.gz"}
shutil.rmtree("out")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Write the files that the examples name, and return their folder."""
    [scan] = write_lits_phantoms(tmp_path, 1)
    scan.rename(tmp_path / "scan.nii.gz")
    (tmp_path / "segmentation-0.nii.gz").rename(tmp_path / "liver.nii.gz")
    write_run(tmp_path / "runs" / "liver" / "hu_small")
    rng = np.random.default_rng(0)
    for name in ("metal_nut/000", "metal_nut/001", "good/000"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_the_examples_run_without_prefect(place: Path) -> None:
    """One process runs the blocks of both pages, because loading the networks' libraries takes most of the time."""
    examples = []
    for page, count in (("README.md", 1), ("docs/reference/python.md", 2)):
        text = (ROOT / page).read_text(encoding="utf-8")
        found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert len(found) == count
        examples += found
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = "\n".join([examples[0], WRITTEN, *examples[1:], WRITTEN, CHECK])
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", script],
        cwd=place, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    images = [line.split() for line in ran.stdout.splitlines() if ".png" in line]
    assert [name for name, _ in images] == ["metal_nut/000.png", "metal_nut/001.png"]
    assert all(0 < float(score) < 4 for _, score in images)
