"""Export of prepared liver slices as images in MVTec AD's layout, for systems that read images but not scans.

    train/good/PLANE.png                                   slices of a healthy case
    test/good/PLANE.png                                    slices without tumour
    test/tumour/PLANE.png, ground_truth/tumour/PLANE_mask.png

PLANE is the number of the slice in the scan, in LPS order from 0. The files contain pixels only, no metadata.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image

from medad.cohort.datasets import LabelledScan
from medad.slices.grid import Slices, mask_to_slices
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.steps.cases import read_truth

CATEGORY = "liver"
"""Category of the images: the name of the folder that contains `train` and `test`."""


def export_case(case: LabelledScan | None, prepared: Path, out: Path) -> None:
    """Write the slices of one prepared case as images into the existing, empty folder `out`.

    Parameters
    ----------
    case
        Test case with its tumour label. None: a training case, which `medad.steps.cases.prepare_case` checked to be
        healthy.
    prepared
        Folder that `medad.steps.cases.prepare_case` wrote.

    Raises
    ------
    InputError
        The case has no tumour label, so normal slices are unknown; or a file cannot be read.
    """
    ready = load_prepared(prepared / PREPARED)
    if case is None:
        write_training_slices(ready.slices, out)
        return
    truth, _ = read_truth(
        case, ready.geometry, "no tumour label, so slices with tumour cannot be distinguished from normal ones"
    )
    write_test_slices(ready.slices, mask_to_slices(truth, ready.slices), out)


def write_training_slices(slices: Slices, out: Path) -> None:
    """Write all slices into `train/good`, with grey values 0..255 unchanged."""
    for pixels, z in zip(slices.pixels, slices.z.tolist(), strict=True):
        _write(out / "train" / "good" / _file_name(z), pixels)


def write_test_slices(slices: Slices, tumour: Bool[ndarray, "N S S"], out: Path) -> None:
    """Write slices with tumour into `test/tumour` with their masks (0 and 255), and the others into `test/good`."""
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
