"""Prepared folders made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from medad.ct.geometry import Geometry
from medad.slices.grid import SliceGrid, Slices
from medad.slices.prepared_file import save_prepared

SIDE = 32


def write_prepared(folder: Path, *, slices: int, tumour: int = 0, seed: int = 0) -> Path:
    """A folder with prepared.safetensors and truth.safetensors: a square liver of noise, tumour in the first slices."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    organ = np.zeros((slices, SIDE, SIDE), bool)
    organ[:, 6:26, 6:26] = True
    pixels = (rng.integers(60, 200, organ.shape, dtype=np.uint8) * organ).astype(np.uint8)
    grid = SliceGrid((SIDE, SIDE), slices, SIDE)
    geometry = Geometry((SIDE, SIDE, slices), np.diag([-1.0, -1.0, 1.0, 1.0]))
    liver = organ.transpose(2, 1, 0).copy()
    save_prepared(folder / "prepared.safetensors", Slices(pixels, organ, np.arange(slices), grid), geometry, liver)
    truth = np.zeros(organ.shape, np.uint8)
    truth[:tumour, 10:14, 10:14] = 1
    save_file({"tumour": truth}, folder / "truth.safetensors")
    return folder
