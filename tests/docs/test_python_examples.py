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


@pytest.mark.parametrize(("page", "blocks"), [("README.md", 1), ("docs/reference/python.md", 2)])
def test_the_examples_run_without_prefect(page: str, blocks: int, place: Path) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(examples) == blocks
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = "\n".join([*examples, CHECK])
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", script],
        cwd=place, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in (place / "out").iterdir()} == {"mask.nii.gz", "probability.nii.gz"}
    if page == "docs/reference/python.md":
        images = [line.split() for line in ran.stdout.splitlines() if ".png" in line]
        assert [name for name, _ in images] == ["metal_nut/000.png", "metal_nut/001.png"]
        assert all(0 < float(score) < 4 for _, score in images)
