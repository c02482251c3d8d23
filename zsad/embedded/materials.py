"""Make photographs of materials with inserted defects, the samples of the demo.

The photographs are bundled with scikit-image, so nothing is downloaded. Brick, grass and gravel are cut into windows
that share no pixel, and each coin is cut out. A quarter of the pieces are normal training images. Half of the others
get a generated defect of a kind that the embedded model was not trained on. The photographs are real, the defects are
not.
"""

from __future__ import annotations

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

SURFACES = ("brick", "grass", "gravel")
WINDOW_PX, COIN_PX, SIDE_PX = 128, 72, 192
LEAST_COIN_PX = 500
CLOSED_PX = 5
"""Radius of the gaps between changed pixels that belong to a defect's mask."""
SEED = 0
USES = ("train", "defect", "test", "defect", "train", "defect", "test", "test")
"""Use of the pieces in turn: a normal training image, a test image with a defect, or a normal test image."""


@dataclass(frozen=True)
class Piece:
    """Window f32[S,S,3] of a photograph with values 0..1, and the region in which a defect may lie."""

    image: Float32[np.ndarray, "S S 3"]
    region: Bool[np.ndarray, "S S"]


def write_materials(folder: Path) -> None:
    """Write MATERIAL/train/good, MATERIAL/test/{good,DEFECT} and MATERIAL/ground_truth/DEFECT into the folder."""
    for name in SURFACES:
        _write(folder / name, _windows(getattr(data, name)()))
    _write(folder / "coins", _coins())


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
    # the light is uneven, so a pixel is compared with its surroundings
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


def _filled(changed: Bool[np.ndarray, "S S"]) -> Bool[np.ndarray, "S S"]:
    """Return the region of a defect as a person would outline it: the changed pixels without gaps and holes."""
    wide = np.pad(changed, CLOSED_PX)  # closing at the edge of the image would otherwise lose pixels
    closed: Bool[np.ndarray, "S S"] = binary_fill_holes(closing(wide, disk(CLOSED_PX)))
    return closed[CLOSED_PX:-CLOSED_PX, CLOSED_PX:-CLOSED_PX]


def _write(folder: Path, pieces: list[Piece]) -> None:
    """Write the pieces by their use. Pieces with a defect get the kinds of defects in turn."""
    kinds = list(defects("held_out").items())
    defective = 0
    for number, piece in enumerate(pieces):
        use = USES[number % len(USES)]
        place, image = "train/good" if use == "train" else "test/good", piece.image
        if use == "defect":
            name, defect = kinds[defective % len(kinds)]
            defective += 1
            rng = np.random.default_rng([SEED, *folder.name.encode(), number])
            image, changed = add_defect(rng, piece.image, piece.region, defect)
            mask = _filled(changed)
            place = f"test/{name}"
            write_png(folder / "ground_truth" / name / f"{number:03}_mask.png", mask.astype(np.uint8) * 255)
        write_png(folder / place / f"{number:03}.png", (image * 255 + 0.5).astype(np.uint8))
