"""The cost of the zero-shot scorer, compared with plain CLIP, with anomalib and with its own parts.

    python benchmarks/zsad.py [--anomalib-python PYTHON] [--only a,c] [--json FILE]

PYTHON is the interpreter of a separate environment with `benchmarks/requirements-anomalib.txt`. Without it, the
comparisons with anomalib are skipped, and the table says so. All figures are ratios of times measured in this run,
alternating between both sides. Both sides have the same images, random weights and number of threads. No time depends
on the values of the weights, the text features or the images.
"""

from __future__ import annotations

import sys
from pathlib import Path


def run() -> None:
    # Python puts the script's folder first, so that this file would be the package zsad
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from flows.machine.environment import prepare_numpy

    prepare_numpy()  # every adflows command does this
    from benchmarks.zsad_table import main

    main(__doc__)


if __name__ == "__main__":
    run()
