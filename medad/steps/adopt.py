"""Step that stores the trained network of a run folder as an artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

WEIGHTS, CURVE = "model.safetensors", "curve.json"


def copy_network(folder: Path, out: Path) -> None:
    """Copy a network's weights, and its training curve if it has one, into the existing folder `out`."""
    shutil.copyfile(folder / WEIGHTS, out / WEIGHTS)
    if (folder / CURVE).is_file():
        shutil.copyfile(folder / CURVE, out / CURVE)
