"""Step that stores a part of a run folder's model as an artifact: a network, a classifier or a calibration."""

from __future__ import annotations

import shutil
from pathlib import Path

CURVE = "curve.json"


def copy_part(folder: Path, name: str, out: Path) -> None:
    """Copy the file `name`, and the training curve next to it if there is one, into the existing folder `out`."""
    shutil.copyfile(folder / name, out / name)
    if (folder / CURVE).is_file():
        shutil.copyfile(folder / CURVE, out / CURVE)
