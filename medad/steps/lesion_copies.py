"""Step that paints lesions in three dimensions into copies of a healthy case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from medad.config.anomalies import SolidLesionSettings
from medad.slices.prepared_file import load_prepared

COPIES = "copies.safetensors"


def write_copies(prepared: Path, settings: SolidLesionSettings, seed: int, out: Path) -> None:
    """Write copies.safetensors into `out`."""
    case = load_prepared(prepared / "prepared.safetensors")
    save_file({"copies": np.array([case.slices.pixels.sum(), settings.copies, seed])}, out / COPIES)
