"""Turned copies of normal images, for few-shot methods and objects that lie in any direction."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage


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
