"""Generate the training images of the embedded model, and held-out images of kinds that it is not trained on."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.random import Generator
from torch import Tensor

from zsad.data.images import write_png
from zsad.embedded.scenes.scenes import Product, SceneImage, Subset, defects, kinds, make_image, make_twins

SIZE_PX = 192
ANOMALOUS_SHARE = 0.6
"""Fraction of the first leg's images that show a defect."""


@dataclass(frozen=True)
class Leg:
    """Part of the training. Each leg has separate images and a new optimiser."""

    twins: bool
    """Whether each scene of all training kinds occurs twice, without and with a defect. Otherwise each scene of the
    first kinds gives one image."""
    scenes: int
    """Number of scenes. Each is generated once and used again with other augmentations."""
    steps: int
    sharpen_from: int
    """Step from which the loss also weighs image scores, see `zsad.embedded.pretrain.loss_of`."""
    learning_rate: float
    warmup_steps: int


@dataclass(frozen=True)
class Pool:
    """Training images: `pixels` u8[n,3,S,S], `masks` bool[n,S,S], and the kind of each image.

    Of two twins the one without a defect comes first.
    """

    pixels: UInt8[Tensor, "n 3 S S"]
    masks: Bool[Tensor, "n S S"]
    kinds: tuple[str, ...]


def numbered_image(seed: int, number: int) -> SceneImage:
    """Return image `number` of the endless sequence that a seed defines, of the first kinds."""
    rng = np.random.default_rng([seed, number, 0])
    while True:
        product = _random_product(rng, "first")
        defect = _random_defect(rng, "first") if rng.random() < ANOMALOUS_SHARE else ""
        try:
            return make_image(rng, SIZE_PX, product=product, defect=defect)
        except ValueError:  # this defect is not visible on this product: choose another pair
            continue


def numbered_twins(seed: int, number: int) -> tuple[SceneImage, SceneImage]:
    """Return scene `number` of the endless sequence that a seed defines, of all training kinds: without and with a
    defect."""
    rng = np.random.default_rng([seed, number])
    while True:
        product = _random_product(rng, "train")
        try:
            return make_twins(rng, SIZE_PX, product=product, defect=_random_defect(rng, "train"))
        except ValueError:
            continue


def _random_product(rng: Generator, subset: Subset) -> Product:
    names = kinds(subset)
    kind, surface = names[int(rng.integers(len(names)))]
    return Product(kind, surface, int(rng.integers(2**31)))


def _random_defect(rng: Generator, subset: Subset) -> str:
    names = list(defects(subset))
    return names[int(rng.integers(len(names)))]


def make_pool(seed: int, leg: Leg, workers: int) -> Pool:
    """Generate the images of a leg: the first scenes of the seed's sequence."""
    count = leg.scenes * (2 if leg.twins else 1)
    pixels = np.empty((count, 3, SIZE_PX, SIZE_PX), np.uint8)
    masks = np.empty((count, SIZE_PX, SIZE_PX), bool)
    names: list[str] = []
    tasks = [(seed, number, leg.twins) for number in range(leg.scenes)]
    with ProcessPoolExecutor(workers) as pool:
        for scene in pool.map(_packed_scene, tasks, chunksize=32):
            for image, mask, kind in scene:
                pixels[len(names)], masks[len(names)] = image, mask
                names.append(kind)
    return Pool(torch.from_numpy(pixels), torch.from_numpy(masks), tuple(names))


def _packed_scene(task: tuple[int, int, bool]) -> list[tuple[np.ndarray, np.ndarray, str]]:
    seed, number, twins = task
    made = numbered_twins(seed, number) if twins else (numbered_image(seed, number),)
    return [(_bytes(each.image).transpose(2, 0, 1), each.mask, each.kind) for each in made]


def _bytes(image: np.ndarray) -> np.ndarray:
    """Convert values 0..1 to bytes, rounded."""
    return (image * 255 + 0.5).astype(np.uint8)


def write_held_out(folder: Path, *, seed: int = 0, each: int = 24) -> None:
    """Write images of the held-out subset in MVTec AD's layout: `each` good and `each` defective ones per kind."""
    names = list(defects("held_out"))
    for number, (kind, surface) in enumerate(kinds("held_out")):
        product = Product(kind, surface, int(np.random.default_rng([seed, number, 11]).integers(2**31)))
        for i in range(2 * each):
            defect = "" if i < each else names[i % len(names)]
            made = _held_out_image(np.random.default_rng([seed, number, i, 13]), product, defect)
            write_png(folder / kind / "test" / (defect or "good") / f"{i:03}.png", _bytes(made.image))
            if defect:
                write_png(
                    folder / kind / "ground_truth" / defect / f"{i:03}_mask.png", made.mask.astype(np.uint8) * 255
                )


def _held_out_image(rng: Generator, product: Product, defect: str) -> SceneImage:
    while True:
        try:
            return make_image(rng, SIZE_PX, product=product, defect=defect, subset="held_out")
        except ValueError:  # the defect is not visible; the generator now gives another one
            continue
