"""The samples of the demo: photographs of materials with inserted defects.

They are generated from photographs in scikit-image, so nothing is downloaded. Nothing here loads an imaging library.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

MATERIALS = "materials"
"""Name of the samples' folder, which has MVTec AD's layout."""
INSERTED_NOTE = (
    "The defects were generated and inserted into scikit-image's photographs (brick, coins, grass, gravel). These "
    "figures show how well inserted defects are found, not real ones."
)
SOURCE = """\
Photographs bundled with scikit-image. brick, grass, gravel: CC0. coins: Brooklyn Museum, no known restrictions.
These are enlarged windows of them. The defects were generated and are not part of the photographs.
train/good, test/good and the folders with defects share no pixel.
"""


def ensure_samples(target: Path, say: Callable[[str], None]) -> Path:
    """Write the samples to `target`/materials unless they exist, and return that folder.

    It contains CATEGORY/train/good, CATEGORY/test/{good,DEFECT} and CATEGORY/ground_truth/DEFECT. An interrupted call
    leaves no incomplete folder of this name. Samples of another version are replaced.
    """
    final = target / MATERIALS
    about = final / "SOURCE.txt"
    if about.is_file() and about.read_text(encoding="utf-8") == SOURCE:
        return final
    say("making samples: photographs of materials with inserted defects")
    work = target / f".{MATERIALS}.new"
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    from zsad.embedded.materials import write_materials

    write_materials(work)
    (work / "SOURCE.txt").write_text(SOURCE, encoding="utf-8")
    work.replace(final)
    return final
