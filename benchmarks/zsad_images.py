"""Generated images for `benchmarks/zsad.py`."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def draw_image(rng: np.random.Generator, side_px: int) -> UInt8[np.ndarray, "S S 3"]:
    """Return coloured noise at three scales. It is as hard to decode as a photograph."""
    total = np.zeros((side_px, side_px, 3), np.float32)
    for cells in (8, side_px // 8, side_px):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((side_px, side_px), Image.Resampling.BILINEAR))
    return (total / 3).astype(np.uint8)


def image_key(number: int) -> str:
    """Return a digest to use instead of the sha256 of an image file."""
    return hashlib.sha256(str(number).encode()).hexdigest()
