"""What the zero-shot scorer costs beside plain CLIP, beside anomalib, and beside its own parts.

    python benchmarks/zsad.py [--anomalib-python PYTHON] [--only a,c] [--json FILE]

PYTHON is the interpreter of an environment with `benchmarks/requirements-anomalib.txt`, which is no part of the
product's; without it the figures beside anomalib are left out, and the table says so. All figures are ratios of
timings of this run, ours and the other's by turns; both have the same images, the same random weights and the same
number of threads. No timing depends on what the weights, the text features or the images are.
"""

from __future__ import annotations

import sys
from pathlib import Path


def run() -> None:
    # the script's folder, which Python puts first, would make this file the package zsad
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from flows.machine.environment import prepare_numpy

    prepare_numpy()  # as every command does
    from benchmarks.zsad_table import main

    main(__doc__)


if __name__ == "__main__":
    run()
