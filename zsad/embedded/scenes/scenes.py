"""Generate images of textures, simple objects and defects, with exact masks, for the training of the embedded model.

Each kind of texture, object or defect belongs either to the training subset or to the held-out subset. Held-out kinds
are used only to measure the model. An image is a pure function of its random generator.
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
"""Subset of textures, objects and defects. `first` is the part of `train` that the first leg uses."""

Picture = Float32[np.ndarray, "S S 3"]
LEAST_CHANGE = 0.06
"""Change of a channel (0..1) above which a pixel belongs to a defect."""
LEAST_AREA = 0.0015
"""Smallest visible fraction of the image for a defect. A smaller one is drawn again."""
TRIES = 12
"""Number of attempts to draw a visible defect."""


@dataclass(frozen=True)
class SceneImage:
    """Generated image with its mask and labels."""

    image: Picture
    """Image f32[S,S,3] with values 0..1."""
    mask: Bool[np.ndarray, "S S"]
    """Mask bool[S,S], True for pixels of a visible defect."""
    kind: str
    """Kind of texture or object in words, for captions."""
    surface: bool
    """Whether the image shows a texture, not an object."""
    defect: str
    """Kind of defect. Empty for a normal image."""


def kinds(subset: Subset) -> tuple[tuple[str, bool], ...]:
    """Return all textures and objects of a subset as pairs of a name and whether it is a texture."""
    textures = HELD_OUT_TEXTURES if subset == "held_out" else TEXTURES
    objects = {"first": OBJECTS, "train": OBJECTS | PARTS, "held_out": HELD_OUT_OBJECTS}[subset]
    return (*((name, True) for name in textures), *((name, False) for name in objects))


def defects(subset: Subset) -> Mapping[str, Callable[..., Picture]]:
    """Return the functions of all defects of a subset by name."""
    return {"first": DEFECTS, "train": DEFECTS | EDGE_DEFECTS, "held_out": HELD_OUT_DEFECTS}[subset]


@dataclass(frozen=True)
class Product:
    """Imaginary product. All its images share colours, scale and surface."""

    kind: str
    """Kind of texture or object, one of `kinds`."""
    surface: bool
    """Whether the kind is a texture, not an object."""
    seed: int
    """Seed of the colours and the scale."""


def make_image(
    rng: Generator,
    size_px: int,
    *,
    product: Product,
    defect: str = "",
    subset: Subset = "train",
) -> SceneImage:
    """Return one image of a product, with or without a defect.

    Parameters
    ----------
    rng
        Random generator of this image, for position, light, noise and the defect.
    size_px
        Side of the image.
    product
        Product in the image.
    defect
        One of `defects(subset)`. Empty for a normal image.
    subset
        Subset that contains `defect`.

    Raises
    ------
    ValueError
        The defect is not visible on this image.
    """
    clean, region = _scene(rng, size_px, product)
    image, mask = clean, np.zeros((size_px, size_px), bool)
    if defect:
        image, mask = add_defect(rng, clean, region, defects(subset)[defect])
    return SceneImage(_with_light_and_noise(rng, image), mask, product.kind, product.surface, defect)


def make_twins(
    rng: Generator, size_px: int, *, product: Product, defect: str, subset: Subset = "train"
) -> tuple[SceneImage, SceneImage]:
    """Return a scene twice, without and with a defect, in different light. Parameters and errors as in `make_image`."""
    clean, region = _scene(rng, size_px, product)
    defective, mask = add_defect(rng, clean, region, defects(subset)[defect])
    return (
        SceneImage(_with_light_and_noise(rng, clean), np.zeros_like(mask), product.kind, product.surface, ""),
        SceneImage(_with_light_and_noise(rng, defective), mask, product.kind, product.surface, defect),
    )


def _with_light_and_noise(rng: Generator, image: Picture) -> Picture:
    """Add uneven light and the noise of a sensor."""
    size_px = image.shape[0]
    light = 1.0 + 0.12 * (fractal_noise(rng, size_px, 1.0) - 0.5) * rng.uniform(0, 2)
    image = image * light[..., None] + rng.normal(0, rng.uniform(0.002, 0.02), image.shape)
    return np.asarray(np.clip(image, 0, 1), np.float32)


def add_defect(
    rng: Generator, clean: Picture, region: Bool[np.ndarray, "S S"], defect: Callable[..., Picture]
) -> tuple[Picture, Bool[np.ndarray, "S S"]]:
    """Draw a defect into `region` of an image. Return the new image and the mask of the changed pixels.

    Raises
    ------
    ValueError
        The defect is not visible after `TRIES` attempts.
    """
    for _ in range(TRIES):
        image = np.clip(defect(rng, clean, region), 0, 1).astype(np.float32)
        mask = np.abs(image - clean).max(-1) > LEAST_CHANGE
        if mask.mean() >= LEAST_AREA:
            return image, mask
    raise ValueError("the defect is not visible on this image")


def _scene(rng: Generator, size_px: int, product: Product) -> tuple[Picture, Bool[np.ndarray, "S S"]]:
    """Return a normal image and the region in which a defect may lie."""
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
    """Return an image in which tones 0..1 are mixtures of two colours of the style."""
    low, high = _two_colours(style)
    mix = np.clip(tone, 0, 1)[..., None]
    return np.asarray(low * (1 - mix) + high * mix, np.float32)
