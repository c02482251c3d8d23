"""Photographs of materials with inserted defects, for the demo: from scikit-image's bundled pictures, no download.

Brick, grass and gravel are cut into windows that share no pixel, coins one by one; into every other one a defect is
drawn by rule, of kinds that the embedded model was not trained on. The photographs are real, the defects are not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32
from scipy.ndimage import binary_fill_holes
from skimage import data
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label, regionprops
from skimage.morphology import closing, disk
from skimage.transform import resize

from zsad.data.images import write_png
from zsad.embedded.scenes.scenes import add_defect, defects

MATERIALS = "materials"
"""The folder's name, in MVTec AD's layout."""
SURFACES = ("brick", "grass", "gravel")
WINDOW_PX, COIN_PX, SIDE_PX = 128, 72, 192
LEAST_COIN_PX = 500
SEED = 0
INSERTED_NOTE = (
    "Defects drawn by rule into scikit-image's photographs (brick, coins, grass, gravel): these figures tell how well "
    "drawn defects are found, not real ones."
)
SOURCE = """\
Photographs bundled with scikit-image. brick, grass, gravel: CC0. coins: Brooklyn Museum, no known restrictions.
Windows of them, enlarged; the defects were drawn by rule and are not part of the photographs.
"""


@dataclass(frozen=True)
class Piece:
    """A window f32[S,S,3] in 0..1 and where a defect may lie."""

    image: Float32[np.ndarray, "S S 3"]
    region: Bool[np.ndarray, "S S"]


def ensure_samples(target: Path, say: Callable[[str], None]) -> Path:
    """Write `target`/materials unless it is there, and return it: CATEGORY/test/{good,DEFECT}, ground_truth/DEFECT.

    The folder appears whole or not at all.
    """
    final = target / MATERIALS
    if (final / "SOURCE.txt").is_file():
        return final
    say("making samples: photographs of materials with inserted defects")
    work = target / f".{MATERIALS}.new"
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    for name in SURFACES:
        _write(work / name, _windows(getattr(data, name)()))
    _write(work / "coins", _coins())
    (work / "SOURCE.txt").write_text(SOURCE, encoding="utf-8")
    work.replace(final)
    return final


def _grey(window: np.ndarray) -> Float32[np.ndarray, "S S 3"]:
    enlarged = resize(window.astype(np.float32) / 255.0, (SIDE_PX, SIDE_PX), order=1, anti_aliasing=False)
    return np.repeat(enlarged[..., None], 3, axis=2).astype(np.float32)


def _windows(photograph: np.ndarray) -> list[Piece]:
    everywhere = np.ones((SIDE_PX, SIDE_PX), bool)
    starts = range(0, photograph.shape[0] - WINDOW_PX + 1, WINDOW_PX)
    return [Piece(_grey(photograph[y : y + WINDOW_PX, x : x + WINDOW_PX]), everywhere) for y in starts for x in starts]


def _coins() -> list[Piece]:
    photograph = data.coins()
    smooth = gaussian(photograph, 1, preserve_range=True)
    # the ground is lit unevenly: what counts is how much brighter a pixel is than its surroundings
    bright = smooth - gaussian(photograph, 40, preserve_range=True)
    found = binary_fill_holes(closing(bright > threshold_otsu(bright), disk(3)))
    pieces = []
    for coin in regionprops(label(found)):
        y, x = (round(c) - COIN_PX // 2 for c in coin.centroid)
        inside = 0 <= y <= photograph.shape[0] - COIN_PX and 0 <= x <= photograph.shape[1] - COIN_PX
        if coin.area < LEAST_COIN_PX or not inside:
            continue
        window = (slice(y, y + COIN_PX), slice(x, x + COIN_PX))
        region = resize((label(found)[window] == coin.label).astype(np.float32), (SIDE_PX, SIDE_PX), order=1) > 0.5
        pieces.append(Piece(_grey(photograph[window]), region))
    return pieces


def _write(folder: Path, pieces: list[Piece]) -> None:
    """Every other piece gets a defect, the kinds in turn."""
    kinds = list(defects("held_out").items())
    for number, piece in enumerate(pieces):
        name, image, mask = "good", piece.image, None
        if number % 2:
            name, defect = kinds[number // 2 % len(kinds)]
            rng = np.random.default_rng([SEED, *folder.name.encode(), number])
            image, mask = add_defect(rng, piece.image, piece.region, defect)
        write_png(folder / "test" / name / f"{number:03}.png", (image * 255 + 0.5).astype(np.uint8))
        if mask is not None:
            write_png(folder / "ground_truth" / name / f"{number:03}_mask.png", mask.astype(np.uint8) * 255)
