"""Grey textures for pseudo anomalies: pictures of a folder, as DRAEM uses DTD, or generated textures.

Each slice's texture comes from that slice's own generator, so it is the same in any batch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from medad.base.errors import InputError
from medad.base.storage import reading
from medad.base.textures import TAU, perlin_clouds, texture_files
from medad.config.anomalies import TextureSettings


class Textures(ABC):
    """A source of textures. `digest` identifies their content."""

    digest: str

    @abstractmethod
    def draw(self, generators: Sequence[torch.Generator], device: torch.device) -> Float[Tensor, "B 1 S S"]:
        """Draw one texture per generator, with grey values 0..255. The generators must be on the CPU."""


def open_textures(settings: TextureSettings, size_px: int) -> Textures:
    """Open the pictures of `settings.folder` and its sub-folders as textures of side `size_px`.

    If the folder is None, textures are generated. Pictures are read here once, into size_px^2 bytes each. DTD at 256 px
    needs 370 MB.

    Raises
    ------
    InputError
        The folder does not exist, contains no picture, or a picture cannot be read.
    """
    if settings.folder is None:
        return GeneratedTextures(size_px)
    return FolderTextures(Path(settings.folder).expanduser(), size_px)


class FolderTextures(Textures):
    """Pictures of a folder, in grey and resized to a square, with random changes.

    DRAEM applies three changes out of a list (brightness, contrast, sharpness, solarising, hue, ...) to each picture.
    Colour changes have no meaning here. Instead, a picture is rotated by quarter turns, flipped or inverted with
    probability one half each, and gets a gamma of 2^U(-1, 1).
    """

    def __init__(self, folder: Path, size_px: int) -> None:
        self._pictures = torch.stack([_read_grey(path, size_px) for path in texture_files(folder)])
        self.digest = hashlib.sha256(self._pictures.numpy().tobytes()).hexdigest()

    def draw(self, generators: Sequence[torch.Generator], device: torch.device) -> Float[Tensor, "B 1 S S"]:
        return torch.stack([self._draw_one(generator) for generator in generators])[:, None].to(device)

    def _draw_one(self, generator: torch.Generator) -> Float[Tensor, "S S"]:
        which = int(torch.randint(len(self._pictures), (), generator=generator))
        quarters, flipped, inverted = torch.randint(4, (3,), generator=generator).tolist()
        share = torch.rot90(self._pictures[which], quarters).float() / 255
        if flipped % 2:
            share = share.flip(-1)
        if inverted % 2:
            share = 1 - share
        return 255 * share**2 ** (2 * torch.rand((), generator=generator) - 1)


def _read_grey(path: Path, size_px: int) -> UInt8[Tensor, "S S"]:
    with reading(path):
        content = path.open("rb")
    with content:
        try:
            picture = Image.open(content)
            picture.draft("L", (size_px, size_px))
            if picture.mode.startswith(("I", "F")):
                raise InputError(path, f"expected a picture with 8 bits per channel, found mode {picture.mode}")
            grey = ImageOps.exif_transpose(picture).convert("L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(path, f"not a readable picture ({type(error).__name__})") from error
        return torch.from_numpy(np.array(grey.resize((size_px, size_px), Image.Resampling.BILINEAR)))


class GeneratedTextures(Textures):
    """Clouds and bands: three octaves of Perlin noise, mixed at random with waves that the noise bends.

    They give contrast and variety and do not imitate a material. They are computed on the device.
    """

    digest = "generated"

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px

    def draw(self, generators: Sequence[torch.Generator], device: torch.device) -> Float[Tensor, "B 1 S S"]:
        side = self._size_px
        cloud = perlin_clouds(generators, side, device)
        numbers = torch.stack([torch.rand(6, generator=generator) for generator in generators])
        share, angle, cycles, phase, level, contrast = (column[:, None, None].to(device) for column in numbers.T)
        place = (torch.arange(side, device=device) + 0.5) / side
        y, x = place[None, :, None], place[None, None, :]
        along = 2 ** (1 + 4 * cycles) * (x * torch.cos(angle * torch.pi) + y * torch.sin(angle * torch.pi))
        pattern = torch.lerp(cloud, torch.sin(TAU * (along + phase + cloud / 2)), share)
        texture: Tensor = 255 * (0.2 + 0.6 * level + (0.2 + 0.4 * contrast) * pattern).clamp(0, 1)[:, None]
        return texture
