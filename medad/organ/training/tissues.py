"""Groups of tissues in the training scans, which `medad.organ.training.torsos` gives new HU, and their sources.

The scans and labels are those of TotalSegmentator's test data (Apache-2.0), in its source distribution, and two CTs of
AMOS (CC BY 4.0). Weights trained on them may be distributed. The chest CT has no label of the liver there, so its
tissues come with this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from medad.ct.io import read_labels_on, read_scan
from medad.organ.coarse import coarse_shape, to_coarse

OTHER, LIVER, SPLEEN, KIDNEY, BLOOD, BOWEL, MUSCLE, GALLBLADDER, GLAND = range(9)
TISSUES = {
    LIVER: (5,),
    SPLEEN: (1,),
    KIDNEY: (2, 3),
    BLOOD: tuple(range(51, 69)),
    BOWEL: (6, 15, 18, 19, 20),
    MUSCLE: tuple(range(80, 90)),
    GALLBLADDER: (4,),
    GLAND: (7, 8, 9),
}
"""Label values of TotalSegmentator's task `total` for each tissue."""
SOURCE_MM = 3.0
"""Voxel size of the training scans."""
CHEST_TISSUES = Path(__file__).with_name("chest_tissues.nii.gz")
BTCV_LIVER = 6


@dataclass(frozen=True, eq=False)
class Source:
    """A training scan with 3 mm voxels, in canonical LPS order."""

    hu: Float32[Tensor, "X Y Z"]
    tissues: UInt8[Tensor, "X Y Z"]
    share: float
    """Share of the training samples that show this scan."""
    slab: bool
    """Whether the scan is a slab of a few centimetres. Samples then show all its planes."""


def read_sources(reference_files: Path, btcv: Path) -> list[Source]:
    """Read the training scans.

    Parameters
    ----------
    reference_files
        Folder `tests/reference_files` of TotalSegmentator's source distribution 2.18.0.
    btcv
        Folder in BTCV layout with two AMOS CTs, numbers 1 and 13.

    Raises
    ------
    InputError
        A file is missing or cannot be read.
    """
    lut = np.zeros(256, np.uint8)
    for tissue, values in TISSUES.items():
        lut[list(values)] = tissue
    own = np.arange(256, dtype=np.uint8)
    amos = np.where(own == BTCV_LIVER, LIVER, OTHER).astype(np.uint8)
    plan = [
        (reference_files / "example_ct.nii.gz", reference_files / "example_seg_fast_force_split.nii.gz", lut, 0.42),
        (reference_files / "aorta_report" / "example_ct.nii.gz", CHEST_TISSUES, own, 0.36),
        (reference_files / "example_ct_dicom", reference_files / "example_seg_dicom.nii.gz", lut, 0.11),
        (btcv / "img" / "img0001.nii.gz", btcv / "label" / "label0001.nii.gz", amos, 0.06),
        (btcv / "img" / "img0013.nii.gz", btcv / "label" / "label0013.nii.gz", amos, 0.05),
    ]
    return [_read(scan, labels, lut, share) for scan, labels, lut, share in plan]


def _read(scan: Path, labels: Path, lut: UInt8[np.ndarray, " 256"], share: float) -> Source:
    volume = read_scan(scan)
    spacing_mm = volume.geometry.canonical_spacing_mm
    shape = coarse_shape(volume.hu.shape, spacing_mm, SOURCE_MM)
    tissues = np.zeros(shape, np.uint8)
    found = lut[read_labels_on(volume.geometry, labels)[0].values]
    for tissue in np.unique(found).tolist():
        if tissue != OTHER:
            tissues[to_coarse(found == tissue, shape) > 0.5] = tissue
    hu = torch.from_numpy(to_coarse(volume.hu, shape))
    return Source(hu, torch.from_numpy(tissues), share, slab=shape[2] < 30)
