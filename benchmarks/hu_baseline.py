"""How well smoothed HU find tumours without a network: the baseline that a method must beat.

    python benchmarks/hu_baseline.py SCAN LABEL [--sigma-mm 3]

LABEL is a LiTS label (liver 1, tumour 2). Prints the voxel AUROC inside the liver of two scores: darkness, and the
distance from the liver's median. HU are smoothed within the liver by normalised convolution. Nothing is trained, and
no threshold is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import ndimage

from medad.ct.io import read_labels_on, read_scan
from medad.evaluation.metrics import auroc
from medad.steps.baseline import smooth_within_liver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("label", type=Path)
    parser.add_argument("--sigma-mm", type=float, default=3.0)
    arguments = parser.parse_args()
    volume = read_scan(arguments.scan)
    labels, _ = read_labels_on(volume.geometry, arguments.label)
    liver = labels.values > 0
    box = ndimage.find_objects(liver.astype(np.uint8))[0]
    hu, liver, tumour = volume.hu[box], liver[box], labels.values[box] == 2
    x, y, z = (arguments.sigma_mm / spacing for spacing in volume.geometry.canonical_spacing_mm)
    smooth = smooth_within_liver(hu, liver, (x, y, z))
    median = float(np.median(hu[liver]))
    truth = tumour[liver]
    print(f"sigma {arguments.sigma_mm:g} mm, liver median {median:.0f} HU")
    print(f"darker              {auroc(-smooth, truth):.3f}")
    print(f"distance to median  {auroc(np.abs(smooth - median), truth):.3f}")


if __name__ == "__main__":
    main()
