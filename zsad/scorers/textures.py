"""Textures for pseudo anomalies: pictures from a folder, as DRAEM uses DTD, or generated textures.

The texture of an image comes from that image's generator. So it does not depend on the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from medad.base.textures import TAU, perlin_clouds, texture_files
from zsad.data.images import read_image

AUGMENTATIONS_PER_TEXTURE = 3
"""Number of different augmentations applied to each picture from a folder (DRAEM)."""


class Textures(ABC):
    """Source of textures."""

    @abstractmethod
    def draw(
        self, generators: Sequence[torch.Generator], size_px: int, device: torch.device
    ) -> Float[Tensor, "B 3 S S"]:
        """Return one texture per generator, values 0..1. Raise InputError for a picture that cannot be read."""


def open_textures(folder: str | Path | None) -> Textures:
    """Return the textures of a folder and its sub-folders. None: return generated textures.

    Raises
    ------
    InputError
        The folder does not exist or contains no picture.
    """
    return GeneratedTextures() if folder is None else TextureFolder(Path(folder).expanduser())


class TextureFolder(Textures):
    """Pictures of a folder, resized to a square. Each gets three of DRAEM's seven augmentations."""

    def __init__(self, folder: Path) -> None:
        self._paths = texture_files(folder)

    def draw(
        self, generators: Sequence[torch.Generator], size_px: int, device: torch.device
    ) -> Float[Tensor, "B 3 S S"]:
        return torch.stack([self._draw_one(generator, size_px) for generator in generators]).to(device)

    def _draw_one(self, generator: torch.Generator, size_px: int) -> Float[Tensor, "3 S S"]:
        path = self._paths[_draw_integer(0, len(self._paths), generator)]
        picture = Image.fromarray(read_image(path)).resize((size_px, size_px), Image.Resampling.BILINEAR)
        for which in torch.randperm(len(AUGMENTATIONS), generator=generator)[:AUGMENTATIONS_PER_TEXTURE].tolist():
            picture = AUGMENTATIONS[which](picture, generator)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32) / 255


def _draw_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Return a random integer, uniform in low..high - 1."""
    return int(torch.randint(low, high, (), generator=generator))


def _draw_uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def posterize(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """Keep the upper 1 to 7 bits."""
    return ImageOps.posterize(picture, _draw_integer(1, 8, generator))


def sharpen(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """Change the sharpness, from blurred (0) to twice as sharp (2)."""
    return ImageEnhance.Sharpness(picture).enhance(_draw_uniform(0.0, 2.0, generator))


def solarize(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """Invert all values above a threshold."""
    return ImageOps.solarize(picture, _draw_integer(32, 129, generator))


def equalise(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """Flatten each channel's histogram."""
    return ImageOps.equalize(picture)


def brighten(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """Scale and shift all channels by the same amounts."""
    factor, shift = _draw_uniform(0.8, 1.2, generator), _draw_uniform(-30.0, 30.0, generator)
    return picture.point([round(level * factor + shift) for level in range(256)] * 3)


def recolour(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """Shift the hue by up to a fifth of the colour circle and change the saturation by up to a fifth."""
    turn, factor = _draw_integer(-51, 52, generator), _draw_uniform(0.8, 1.2, generator)
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([(level + turn) % 256 for level in range(256)])
    return Image.merge(
        "HSV", (turned, saturation.point([round(level * factor) for level in range(256)]), value)
    ).convert("RGB")


def stretch(picture: Image.Image, generator: torch.Generator) -> Image.Image:
    """Stretch each channel to 0..255."""
    return ImageOps.autocontrast(picture)


AUGMENTATIONS: tuple[Callable[[Image.Image, torch.Generator], Image.Image], ...] = (
    posterize,
    sharpen,
    solarize,
    equalise,
    brighten,
    recolour,
    stretch,
)
"""Augmentations named in DRAEM's paper."""


class GeneratedTextures(Textures):
    """Generated textures (bands, weaves and clouds): waves distorted by Perlin noise, with a random palette.

    The noise has three octaves. The textures are meant to have contrast and variety, not to look like a real material.
    They are computed on the device.
    """

    def draw(
        self, generators: Sequence[torch.Generator], size_px: int, device: torch.device
    ) -> Float[Tensor, "B 3 S S"]:
        cloud = perlin_clouds(generators, size_px, device)
        numbers = torch.stack([torch.rand(18, generator=generator) for generator in generators])
        kind, angle, first, second, phase, bend, contrast, grain, colourful = (
            column[:, None, None].to(device) for column in numbers[:, :9].T
        )
        # three colours, from grey to vivid; one is dark and one is light, so no texture is flat
        palette = numbers[:, 9:].view(-1, 3, 3, 1, 1).to(device)
        palette = torch.lerp(palette.mean(2, keepdim=True), palette, colourful[:, None, None])
        dark, middle, light = palette[:, 0] / 2, palette[:, 1], (1 + palette[:, 2]) / 2

        place = (torch.arange(size_px, device=device) + 0.5) / size_px - 0.5
        y, x = place[None, :, None], place[None, None, :]
        angle = angle * torch.pi
        # one third of the textures each: clouds (no wave), bands (one wave), weaves (two waves)
        along = torch.where(kind < 1 / 3, 0.0, 2 ** (1 + 4 * first)) * (x * angle.cos() + y * angle.sin())
        across = torch.where(kind < 2 / 3, 0.0, 2 ** (1 + 4 * second)) * (y * angle.cos() - x * angle.sin())
        warp = (0.3 + bend) * cloud
        waves = torch.sin(TAU * (along + phase + warp)) * torch.cos(TAU * (across + 0.3 * warp * (kind > 2 / 3)))
        tone = (0.5 + (0.4 + contrast**3) * waves + 0.6 * (grain - 0.5) * cloud).clamp(0, 1)[:, None]
        lower = torch.lerp(dark, middle, (2 * tone).clamp_max(1))
        return torch.where(tone <= 0.5, lower, torch.lerp(middle, light, (2 * tone - 1).clamp_min(0)))
