"""The Python examples of README.md and of the pages about `medad.segment`, run in a new process without Prefect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medad.ct.io import write_hu, write_mask
from tests.medad.organ.torso import make_torso
from tests.medad.trained_runs import write_run

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
assert not {"prefect", "flows", "typer"} & {name.split(".")[0] for name in sys.modules}
"""
GIVEN, FOUND = ({"mask.nii.gz", "probability.nii.gz", *more} for more in ((), ("liver.nii.gz",)))
"""Files that a result with a given liver mask writes, and those of a result with an automatic one."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Write the files that the examples name, and return their folder."""
    torso = make_torso().planes(30, 55)
    write_hu(tmp_path / "scan.nii.gz", torso.hu, torso.geometry)
    write_mask(tmp_path / "liver.nii.gz", torso.liver, torso.geometry)
    write_run(tmp_path / "runs" / "liver" / "hu_small")
    rng = np.random.default_rng(0)
    for name in ("metal_nut/000", "metal_nut/001", "good/000"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return tmp_path


def examples_of(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def written(names: set[str]) -> str:
    """Return a script that checks the names of the files in out, and removes this folder."""
    return f"""
import pathlib, shutil
assert {{path.name for path in pathlib.Path("out").iterdir()}} == {names}
shutil.rmtree("out")
"""


def test_the_examples_run_without_prefect(place: Path) -> None:
    """One process runs the blocks of all pages, because loading the networks' libraries takes most of the time."""
    [readme], [how_to] = examples_of("README.md"), examples_of("docs/how-to/segment.md")
    automatic, given, images = examples_of("docs/reference/python.md")
    # weights on this machine must not change the method that finds the liver, or the encoder of the images
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOTALSEG_WEIGHTS_PATH": str(place / "weights")}
    environment |= {"ADFLOWS_MODELS": str(place / "models"), "HF_HUB_CACHE": str(place / "hub")}
    script = "\n".join(
        [readme, written(FOUND), how_to, automatic, written(FOUND), given, written(GIVEN), images, CHECK]
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", script],
        cwd=place, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "the liver mask was made automatically (built-in, " in ran.stdout
    scores = [line.split() for line in ran.stdout.splitlines() if ".png" in line]
    assert [name for name, _ in scores] == ["metal_nut/000.png", "metal_nut/001.png"]
    assert all(0 < float(score) < 4 for _, score in scores)
