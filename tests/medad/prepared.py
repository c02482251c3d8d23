"""Prepared folders made by hand, and settings with which networks train on them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from medad.config.liver import LiverSettings
from medad.ct.geometry import Geometry
from medad.slices.grid import SliceGrid, Slices
from medad.slices.prepared_file import PREPARED, save_prepared

SIDE = 32
TINY = {"widths": (8, 8, 8), "groups": 4}
DISC = np.hypot(*(np.mgrid[:SIDE, :SIDE] - SIDE / 2)) < SIDE * 0.42


def save_slices(
    folder: Path,
    pixels: NDArray[np.uint8],
    organ: NDArray[np.bool_],
    *,
    affine: NDArray[np.float64] | None = None,
    grey_per_hu: float | None = None,
) -> Path:
    """Write prepared.safetensors of slices that are the planes of their scan."""
    folder.mkdir(parents=True, exist_ok=True)
    count, side, _ = pixels.shape
    slices = Slices(pixels, organ, np.arange(count), SliceGrid((side, side), count, side))
    liver = np.ascontiguousarray(organ.transpose(2, 1, 0))
    geometry = Geometry(liver.shape, np.eye(4) if affine is None else affine)
    save_prepared(folder / PREPARED, slices, geometry, liver, grey_per_hu)
    return folder


def write_prepared(folder: Path, *, slices: int, tumour: int = 0, seed: int = 0) -> Path:
    """Write prepared.safetensors and truth.safetensors: a square liver of noise with tumour in the first slices."""
    rng = np.random.default_rng(seed)
    organ = np.zeros((slices, SIDE, SIDE), bool)
    organ[:, 6:26, 6:26] = True
    pixels = (rng.integers(60, 200, organ.shape, dtype=np.uint8) * organ).astype(np.uint8)
    save_slices(folder, pixels, organ, affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    truth = np.zeros(organ.shape, np.uint8)
    truth[:tumour, 10:14, 10:14] = 1
    save_file({"tumour": truth}, folder / "truth.safetensors")
    return folder


def tiny_settings(**changes: Any) -> LiverSettings:
    """Return settings of small networks with three levels, with these changes."""
    values: dict[str, Any] = {
        "name": "test",
        "gpus": "cpu",
        "train_data": {"root": "x", "layout": "btcv"},
        "test_data": {"root": "x", "layout": "lits"},
        "synthesis": {"blur_sigma_px": 4.0, "ellipse_px": 3},
        "restoration": TINY,
        "segmentation": TINY,
    }
    return LiverSettings.model_validate(values | changes)
