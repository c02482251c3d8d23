"""Images made by rule: textures, simple objects and defects, with exact masks. What the embedded model learns from.

Every kind belongs to one of two halves: the training subset is learned from; the other, whole classes of textures,
objects and defects, is seen in measurements alone. An image is a pure function of its generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32
from numpy.random import Generator

from zsad.embedded.scenes.defects import DEFECTS, EDGE_DEFECTS, HELD_OUT_DEFECTS
from zsad.embedded.scenes.fields import fractal_noise, place_object
from zsad.embedded.scenes.objects import HELD_OUT_OBJECTS, OBJECTS
from zsad.embedded.scenes.parts import PARTS
from zsad.embedded.scenes.textures import HELD_OUT_TEXTURES, TEXTURES

Subset = Literal["first", "train", "held_out"]
"""`first` is the part of `train` that training begins with."""

Picture = Float32[np.ndarray, "S S 3"]
LEAST_CHANGE = 0.06
"""A pixel belongs to a defect when some channel (0..1) changed by more than this."""
LEAST_AREA = 0.0015
"""A defect whose visible part is smaller than this fraction of the image is drawn again."""
TRIES = 12


@dataclass(frozen=True)
class SceneImage:
    """One image made by rule.

    `image` f32[S,S,3] in 0..1; `mask` bool[S,S], True where a defect is to be seen; `kind` in words, for captions;
    `surface` tells textures from objects; `defect` is empty for a normal image.
    """

    image: Picture
    mask: Bool[np.ndarray, "S S"]
    kind: str
    surface: bool
    defect: str


def kinds(subset: Subset) -> tuple[tuple[str, bool], ...]:
    """(name, is it a surface) of all textures and objects of one subset."""
    textures = HELD_OUT_TEXTURES if subset == "held_out" else TEXTURES
    objects = {"first": OBJECTS, "train": OBJECTS | PARTS, "held_out": HELD_OUT_OBJECTS}[subset]
    return (*((name, True) for name in textures), *((name, False) for name in objects))


def defects(subset: Subset) -> Mapping[str, Callable[..., Picture]]:
    """Name -> function of all defects of one subset."""
    return {"first": DEFECTS, "train": DEFECTS | EDGE_DEFECTS, "held_out": HELD_OUT_DEFECTS}[subset]


@dataclass(frozen=True)
class Product:
    """What all images of one made-up product share: colours, scale and surface."""

    kind: str
    surface: bool
    seed: int


def make_image(
    rng: Generator,
    size_px: int,
    *,
    product: Product,
    defect: str = "",
    subset: Subset = "train",
) -> SceneImage:
    """Draw one image of a product, with a defect or without.

    Parameters
    ----------
    rng
        Of this image: position, light, noise and the defect.
    size_px
        Side of the image.
    product
        The product: `kind` is one of `kinds`, and `seed` fixes its colours and scale.
    defect
        One of `defects(subset)`; empty for a normal image.
    subset
        Where `defect` is looked up.
    """
    clean, region = _scene(rng, size_px, product)
    image, mask = clean, np.zeros((size_px, size_px), bool)
    if defect:
        image, mask = add_defect(rng, clean, region, defects(subset)[defect])
    return SceneImage(_with_light_and_noise(rng, image), mask, product.kind, product.surface, defect)


def make_twins(
    rng: Generator, size_px: int, *, product: Product, defect: str, subset: Subset = "train"
) -> tuple[SceneImage, SceneImage]:
    """One scene twice, whole and with a defect, each in its own light; parameters and errors as of `make`."""
    clean, region = _scene(rng, size_px, product)
    spoilt, mask = add_defect(rng, clean, region, defects(subset)[defect])
    return (
        SceneImage(_with_light_and_noise(rng, clean), np.zeros_like(mask), product.kind, product.surface, ""),
        SceneImage(_with_light_and_noise(rng, spoilt), mask, product.kind, product.surface, defect),
    )


def _with_light_and_noise(rng: Generator, image: Picture) -> Picture:
    """In uneven light, with the noise of a sensor."""
    size_px = image.shape[0]
    light = 1.0 + 0.12 * (fractal_noise(rng, size_px, 1.0) - 0.5) * rng.uniform(0, 2)
    image = image * light[..., None] + rng.normal(0, rng.uniform(0.002, 0.02), image.shape)
    return np.asarray(np.clip(image, 0, 1), np.float32)


def add_defect(
    rng: Generator, clean: Picture, region: Bool[np.ndarray, "S S"], defect: Callable[..., Picture]
) -> tuple[Picture, Bool[np.ndarray, "S S"]]:
    """Draw a defect into `region` of an image until it is to be seen; the image and the mask of what changed.

    Raises
    ------
    ValueError
        The defect does not show on this image in `TRIES` attempts.
    """
    for _ in range(TRIES):
        image = np.clip(defect(rng, clean, region), 0, 1).astype(np.float32)
        mask = np.abs(image - clean).max(-1) > LEAST_CHANGE
        if mask.mean() >= LEAST_AREA:
            return image, mask
    raise ValueError("the defect does not show on this image")


def _scene(rng: Generator, size_px: int, product: Product) -> tuple[Picture, Bool[np.ndarray, "S S"]]:
    """A normal image, and where a defect may lie."""
    style = np.random.default_rng(product.seed)
    if product.surface:
        tone = {**TEXTURES, **HELD_OUT_TEXTURES}[product.kind](style, rng, size_px)
        return coloured(style, tone), np.ones((size_px, size_px), bool)
    low, high = _two_colours(style)
    ground = style.uniform(0.02, 0.98, 3) * np.ones((size_px, size_px, 3))
    if style.random() < 0.4:
        ground = (
            ground + style.uniform(0.03, 0.12) * (fractal_noise(rng, size_px, style.uniform(0.3, 1.2)) - 0.5)[..., None]
        )
    spot = place_object(rng, size_px, turn=style.random() < 0.7)
    cover, tone = {**OBJECTS, **PARTS, **HELD_OUT_OBJECTS}[product.kind](style, spot)
    if style.random() < 0.5:
        tone = tone + style.uniform(0.05, 0.25) * (fractal_noise(rng, size_px, style.uniform(0.0, 0.8)) - 0.5)
    tone = np.clip(tone, 0, 1)[..., None]
    body = low * (1 - tone) + high * tone
    image = ground * (1 - cover[..., None]) + body * cover[..., None]
    return np.clip(image, 0, 1).astype(np.float32), cover > 0.5


def _two_colours(style: Generator) -> tuple[np.ndarray, np.ndarray]:
    base = style.uniform(0.1, 0.9, 3) if style.random() < 0.6 else np.full(3, style.uniform(0.1, 0.9))
    shift = style.choice([-1, 1]) * style.uniform(0.15, 0.5) + style.uniform(-0.12, 0.12, 3)
    return np.clip(base, 0, 1), np.clip(base + shift, 0, 1)


def coloured(style: Generator, tone: Float32[np.ndarray, "S S"]) -> Picture:
    """Tones 0..1 between two colours of the style."""
    low, high = _two_colours(style)
    mix = np.clip(tone, 0, 1)[..., None]
    return np.asarray(low * (1 - mix) + high * mix, np.float32)
