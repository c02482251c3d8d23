"""Turned copies of normal images, for few-shot methods and objects that lie in any direction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from zsad.data.images import read_image, write_png


def turn_image(image: UInt8[np.ndarray, "H W 3"], degrees: float) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image turned about its centre, counterclockwise, at the same size.

    Values are interpolated bilinearly. Beyond its borders the image is continued by its reflection.
    """
    height, width = image.shape[:2]
    angle = np.deg2rad(degrees)
    cosine, sine = np.cos(angle), np.sin(angle)
    # maps a place of the result to its place in the image; rows run downwards
    matrix = np.array([[cosine, sine], [-sine, cosine]])
    centre = np.array([height - 1, width - 1]) / 2
    shift = centre - matrix @ centre
    channels = [
        ndimage.affine_transform(image[..., channel].astype(np.float64), matrix, shift, order=1, mode="mirror")
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1).round().clip(0, 255).astype(np.uint8)


def write_turned_copies(path: Path, turns: int, folder: Path) -> tuple[Path, ...]:
    """Return the image and `turns` - 1 turned copies, written to `folder` as PNG. The steps are 360 / `turns` degrees.

    Raises
    ------
    InputError
        The image cannot be used.
    """
    if turns == 1:
        return (path,)
    image = read_image(path)
    copies = [path]
    for step in range(1, turns):
        copy = folder / f"{step}.png"
        write_png(copy, turn_image(image, step * 360 / turns))
        copies.append(copy)
    return tuple(copies)
