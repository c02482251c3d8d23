"""Prepared liver slices as pictures in MVTec AD's layout, for systems that know images and no scans.

    train/good/PLANE.png                                   of a healthy case
    test/good/PLANE.png                                    slices without tumour
    test/tumour/PLANE.png, ground_truth/tumour/PLANE_mask.png

PLANE is the slice's number in the scan, in LPS order from 0. The files hold pixels and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image

from medad.cohort.datasets import LabelledScan
from medad.slices.grid import Slices, mask_to_slices
from medad.slices.prepared_file import load_prepared
from medad.steps.cases import PREPARED, read_truth

CATEGORY = "liver"
"""What the pictures show, as the folder around `train` and `test` is called."""


def export_case(case: LabelledScan | None, prepared: Path, out: Path) -> None:
    """Write one prepared case's slices as pictures into the existing, empty folder `out`.

    Parameters
    ----------
    case
        A test case with its tumour label. None: a training case, whose liver `medad.steps.cases.prepare_case` found
        healthy.
    prepared
        Folder that `medad.steps.cases.prepare_case` wrote.

    Raises
    ------
    InputError
        The case has no tumour label, so that nobody knows which slices are normal; a file cannot be read.
    """
    ready = load_prepared(prepared / PREPARED)
    if case is None:
        write_training_slices(ready.slices, out)
        return
    truth = read_truth(case, ready.geometry, "no tumour label to tell slices with tumour from normal ones")
    write_test_slices(ready.slices, mask_to_slices(truth, ready.slices), out)


def write_training_slices(slices: Slices, out: Path) -> None:
    """All slices into `train/good`, grey values 0..255 as they are."""
    for pixels, z in zip(slices.pixels, slices.z.tolist(), strict=True):
        _write(out / "train" / "good" / _file_name(z), pixels)


def write_test_slices(slices: Slices, tumour: Bool[ndarray, "N S S"], out: Path) -> None:
    """Slices with a tumour pixel into `test/tumour`, with their masks (0 and 255); the others into `test/good`."""
    for pixels, mask, z in zip(slices.pixels, tumour, slices.z.tolist(), strict=True):
        label = "tumour" if mask.any() else "good"
        _write(out / "test" / label / _file_name(z), pixels)
        if mask.any():
            _write(out / "ground_truth" / label / _file_name(z, "_mask"), mask.astype(np.uint8) * np.uint8(255))


def _file_name(z: int, suffix: str = "") -> str:
    return f"{z:04d}{suffix}.png"


def _write(path: Path, pixels: UInt8[ndarray, "S S"]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
