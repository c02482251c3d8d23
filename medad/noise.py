"""Random-shape masks from blurred noise (000, Algorithm 1), batched on the device of the generator.

Blurring is a product with a banded matrix on either side, and the elliptical morphology is a handful of shifted ORs:
both are the exact operations of the per-image algorithm, without its 121-tap and 81-tap windows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TRUNCATE_SIGMAS = 4.0


@lru_cache(maxsize=8)
def _blur_matrix(size_px: int, sigma_px: float, device: torch.device) -> Tensor:
    """Gaussian blur of a line as a matrix: mirrored edges, cut at 4 sigma, as scipy.ndimage.gaussian_filter does."""
    radius = int(TRUNCATE_SIGMAS * sigma_px + 0.5)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (offset / sigma_px) ** 2)
    weight /= weight.sum()
    source = (torch.arange(size_px)[:, None] + offset.long()[None, :]) % (2 * size_px)
    source = torch.where(source >= size_px, 2 * size_px - 1 - source, source)
    matrix = torch.zeros(size_px, size_px, dtype=torch.float64)
    matrix.scatter_add_(1, source, weight.expand(size_px, -1).contiguous())
    return matrix.to(device=device, dtype=torch.float32)


def gaussian_blur(image: Float[Tensor, "B 1 H W"], sigma_px: float) -> Float[Tensor, "B 1 H W"]:
    """Blur with a Gaussian of standard deviation `sigma_px`, edges mirrored (d c b a | a b c d)."""
    rows = _blur_matrix(image.shape[-2], sigma_px, image.device)
    columns = _blur_matrix(image.shape[-1], sigma_px, image.device)
    return rows @ image @ columns.T


def ellipse(side_px: int) -> Bool[Tensor, "K K"]:
    """Elliptical structuring element of odd side; its row at height dy reaches round(sqrt(r^2 - dy^2)) to each side."""
    radius = side_px // 2
    element = torch.zeros(side_px, side_px, dtype=torch.bool)
    for row, half in enumerate(_half_widths(radius)):
        element[row, radius - half : radius + half + 1] = True
    return element


def _half_widths(radius: int) -> list[int]:
    if radius == 0:
        return [0]
    return [round(sqrt(max(radius**2 - dy**2, 0))) for dy in range(-radius, radius + 1)]


@lru_cache(maxsize=8)
def _boxes(side_px: int) -> tuple[tuple[int, int], ...]:
    """The ellipse as a union of centred boxes (half height, half width): its rows narrow away from the middle."""
    halves = _half_widths(side_px // 2)[side_px // 2 :]
    corners = [(height, half) for height, half in enumerate(halves)]
    keep = [corner for corner, following in pairwise(corners) if following[1] < corner[1]]
    return (*keep, corners[-1])


def _reach(mask: Tensor, half: int, dim: int) -> Tensor:
    """OR of all shifts of -half..half along `dim`, by doubling."""
    length = mask.shape[dim]
    half = min(half, length - 1)
    width = 2 * half + 1
    pad = list(mask.shape)
    pad[dim] = half
    edge = mask.new_zeros(pad)
    run = torch.cat((edge, mask, edge), dim)
    done = 1
    while done < width:
        step = min(done, width - done)
        kept = run.shape[dim] - step
        run = run.narrow(dim, 0, kept) | run.narrow(dim, step, kept)
        done += step
    return run.narrow(dim, 0, length)


def dilate(mask: Bool[Tensor, "B 1 H W"], side_px: int) -> Bool[Tensor, "B 1 H W"]:
    """Dilation by the ellipse; nothing enters from outside the image."""
    out = torch.zeros_like(mask)
    for half_height, half_width in _boxes(side_px):
        out |= _reach(_reach(mask, half_width, -1), half_height, -2)
    return out


def erode(mask: Bool[Tensor, "B 1 H W"], side_px: int) -> Bool[Tensor, "B 1 H W"]:
    """Erosion by the ellipse; the image's edge does not erode."""
    return ~dilate(~mask, side_px)


def open_close(mask: Bool[Tensor, "B 1 H W"], side_px: int) -> Bool[Tensor, "B 1 H W"]:
    """Morphological opening, then closing, by the ellipse."""
    opened = dilate(erode(mask, side_px), side_px)
    return erode(dilate(opened, side_px), side_px)


def stretch(image: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 H W"]:
    """Rescale each image linearly so that its minimum is 0 and its maximum 255; a constant image becomes 0."""
    low = image.amin((-2, -1), keepdim=True)
    span = image.amax((-2, -1), keepdim=True) - low
    return (image - low) / span.clamp_min(torch.finfo(image.dtype).tiny) * 255.0


def blob_masks(
    noise: Float[Tensor, "B 1 H W"], *, blur_sigma_px: float, threshold_grey: float, ellipse_px: int
) -> Bool[Tensor, "B 1 H W"]:
    """Algorithm 1 from its Gaussian noise on: blur, stretch to 0..255, binarise above the threshold, open, close.

    Parameters
    ----------
    noise
        Standard normal noise, one image a mask.
    blur_sigma_px
        Standard deviation of the blur.
    threshold_grey
        Grey value in (0, 255); above it is anomalous. Lower gives larger blobs.
    ellipse_px
        Side of the elliptical structuring element, odd.
    """
    return open_close(stretch(gaussian_blur(noise, blur_sigma_px)) > threshold_grey, ellipse_px)
