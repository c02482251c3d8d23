"""Small auxiliary sets for the learned systems, and the equations of AnomalyCLIP as plain Python loops."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.zsad.tiny_clip import tiny_encoder
from zsad.clip.feature_store import FeatureStore, read_text
from zsad.config.run import EncoderSettings, PromptSettings
from zsad.data.labelled import LabelledImage
from zsad.scorers.interface import CategoryFeatures
from zsad.steps.encode import encode_category_text, encode_images
from zsad.steps.results import Source

Grid = Sequence[Sequence[float]]
OUTPUTS = ("patches", "block-1", "block-3", "vv-2", "vv-3")
SIZES_HW = ((32, 32), (40, 40), (32, 48), (64, 64), (32, 32), (48, 32))
"""Sizes of the images. Those that are not square have two crops."""


def encoder_settings(folder: Path, seed: int = 0, **given: object) -> EncoderSettings:
    """Return settings of a tiny CLIP with two text layers and three blocks, the last two on the V-V path."""
    values: dict[str, Any] = {"vv_blocks": 2, "class_ln_post": False, "batch_size": 4} | given
    return tiny_encoder(folder, seed, **values)


def make_source(root: Path, name: str, encoder: EncoderSettings, seed: int = 0) -> Source[Path]:
    """Write noise images. Every second image has a bright square, and its mask shows that square."""
    rng = np.random.default_rng([seed, len(name)])
    folder = root / name
    folder.mkdir(parents=True)
    paths, items = [], []
    for number, (height, width) in enumerate(SIZES_HW):
        image = rng.integers(40, 110, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        if number % 2:
            top, left = (int(rng.integers(0, side - 12)) for side in (height, width))
            image[top : top + 12, left : left + 12] = 250
            mask[top : top + 12, left : left + 12] = 255
        path = folder / f"{number}.png"
        Image.fromarray(image).save(path)
        Image.fromarray(mask).save(folder / f"{number}_mask.png")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        paths.append(path)
        defect, mask_path = "square" if number % 2 else "", folder / f"{number}_mask.png"
        items.append(LabelledImage(str(number), digest, path, bool(number % 2), defect, mask_path))
    encode_images(paths, [item.sha256 for item in items], encoder, "cpu", folder / "features", outputs=OUTPUTS)
    encode_category_text(name, encoder, PromptSettings(style="clip"), "cpu", folder / "text")
    return Source(name, folder / "features", folder / "text", items)


def category_features(source: Source[Path], encoder: EncoderSettings, checkpoint: Path | None) -> CategoryFeatures:
    """Return the features of the source's images, to be scored."""
    assert source.text is not None
    store = FeatureStore(source.features)
    return CategoryFeatures(
        store=store,
        text=read_text(source.text),
        references=np.empty((len(store), 0), dtype=np.int64),
        shots=None,
        paths=(),
        category=source.name,
        encoder=encoder,
        checkpoint=checkpoint,
        seed=0,
        device=torch.device("cpu"),
        batch_size=2,
    )


def square(patches: Sequence[float]) -> list[list[float]]:
    """Return the patches as rows of a square."""
    side = math.isqrt(len(patches))
    return [list(patches[row * side : (row + 1) * side]) for row in range(side)]


def up(grid: Grid, size: int, *, align_corners: bool = False) -> list[list[float]]:
    """Upsample bilinearly between the centres of patches. Beyond the outermost centres values are constant.

    With `align_corners`, the outermost centres are those of the corner pixels.
    """
    side = len(grid)

    def between(at: int) -> tuple[int, int, float]:
        place = at * (side - 1) / (size - 1) if align_corners else max((at + 0.5) * side / size - 0.5, 0.0)
        low = min(int(place), side - 1)
        return low, min(low + 1, side - 1), place - low

    out = []
    for y in range(size):
        top, bottom, down = between(y)
        row = []
        for x in range(size):
            left, right, across = between(x)
            upper = grid[top][left] * (1 - across) + grid[top][right] * across
            lower = grid[bottom][left] * (1 - across) + grid[bottom][right] * across
            row.append(upper * (1 - down) + lower * down)
        out.append(row)
    return out


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return dot(a, b) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def shares(to_normal: float, to_anomalous: float) -> tuple[float, float]:
    """Return the softmax of two logits (AnomalyCLIP, eq. 1)."""
    top = max(to_normal, to_anomalous)
    normal, anomalous = math.exp(to_normal - top), math.exp(to_anomalous - top)
    return normal / (normal + anomalous), anomalous / (normal + anomalous)


def focal(normal: Sequence[Grid], anomalous: Sequence[Grid], masks: Sequence[Grid]) -> float:
    """Return the mean over all pixels of -(1 - p)^2 log p, with p the share of the true class."""
    total, count = 0.0, 0
    for n, a, mask in zip(normal, anomalous, masks, strict=True):
        for y, row in enumerate(mask):
            for x, true in enumerate(row):
                p = a[y][x] if true else n[y][x]
                total -= (1 - p) ** 2 * math.log(p)
                count += 1
    return total / count


def dice(predicted: Sequence[Grid], truth: Sequence[Grid]) -> float:
    """Return the mean over the maps of 1 - (2 sum p y + 1) / (sum p + sum y + 1)."""
    each = []
    for p, y in zip(predicted, truth, strict=True):
        both = sum(a * b for row_p, row_y in zip(p, y, strict=True) for a, b in zip(row_p, row_y, strict=True))
        each.append(1 - (2 * both + 1) / (sum(map(sum, p)) + sum(map(sum, y)) + 1))
    return sum(each) / len(each)


def smoothed(grid: Grid, sigma: float) -> list[list[float]]:
    """Smooth with a Gaussian cut off at four sigma, with edges reflected, one axis after the other."""
    reach = int(4 * sigma + 0.5)
    kernel = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)]

    def along(row: Sequence[float]) -> list[float]:
        length = len(row)

        def at(i: int) -> float:
            i %= 2 * length
            return row[i] if i < length else row[2 * length - 1 - i]

        return [sum(k * at(x + d - reach) for d, k in enumerate(kernel)) / sum(kernel) for x in range(length)]

    rows = [along(row) for row in grid]
    columns = [along([row[x] for row in rows]) for x in range(len(rows[0]))]
    return [[column[y] for column in columns] for y in range(len(rows))]
