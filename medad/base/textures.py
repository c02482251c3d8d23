"""Textures of pseudo anomalies: the pictures of a folder, and the clouds of generated textures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from medad.base.errors import InputError
from medad.base.noise import draw_lattice, perlin_noise
from medad.base.storage import file_digest, lines_digest, reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""File endings of pictures, in lower case."""
OCTAVES = ((1, 3), (3, 4), (5, 6))
"""Ranges of lattice cells per side, as exponents of 2, from coarse to fine. Each axis draws its own number, so grains
may be elongated."""
GAINS = (1.0, 0.6, 0.3)
TAU = 2 * torch.pi


def texture_files(folder: Path) -> list[Path]:
    """List the pictures of a folder and its sub-folders in the order of their relative paths. Hidden files are skipped.

    Raises
    ------
    InputError
        The folder does not exist or contains no picture.
    """
    with reading(folder):
        folder.stat()
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    shown = sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    if not shown:
        raise InputError(folder, f"no textures here; expected {', '.join(SUFFIXES)} files")
    return [folder / name for name in shown]


def textures_digest(folder: Path) -> str:
    """Return the sha256 of the pictures' contents in their order. Raises InputError."""
    return lines_digest(map(file_digest, texture_files(folder)))


def perlin_clouds(generators: Sequence[torch.Generator], size_px: int, device: torch.device) -> Float[Tensor, "B S S"]:
    """Draw three octaves of Perlin noise for each generator, computed on the device."""
    cloud = torch.zeros(len(generators), size_px, size_px, device=device)
    for exponents, gain in zip(OCTAVES, GAINS, strict=True):
        cloud += gain * perlin_noise(draw_lattice(generators, scale_exponents=exponents), (size_px, size_px), device)
    return cloud
