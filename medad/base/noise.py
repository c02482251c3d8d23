"""LEAF: random masks from blurred noise and from Perlin noise, in batches on the device.

Blurred noise follows Algorithm 1 of the thesis (Zhang, University of Alberta, 2024). Perlin noise follows DRAEM.

Blurring multiplies by a banded matrix from both sides. The elliptical morphology is a few shifted ORs. Both give
exactly the results of the per-image algorithm, without its 121-tap and 81-tap windows.

The few random numbers of an image's Perlin noise come from that image's own generator on the CPU. The pixels are
computed on the device. So an image's noise is the same in any batch and on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import pi, sqrt

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

TRUNCATE_SIGMAS = 4.0
DRAEM_SCALE_EXPONENTS = (0, 5)
"""Range of exponents e: the mask's noise has 2^e lattice cells along an axis (public code of DRAEM, 2021)."""
DRAEM_ROTATION_DEG = (-90.0, 90.0)
"""Range of the angle by which the noise is rotated (public code of DRAEM, 2021)."""
DRAEM_THRESHOLD = 0.5
"""Noise value above which a pixel is in the mask (public code of DRAEM, 2021)."""


@lru_cache(maxsize=8)
def _blur_matrix(size_px: int, sigma_px: float, device: torch.device) -> Tensor:
    """Return the Gaussian blur of a line as a matrix. Like scipy.ndimage.gaussian_filter, it reflects at the edges and
    is cut at 4 sigma."""
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
    """Blur with a Gaussian of standard deviation `sigma_px`. The image is reflected at its edges (c b a | a b c)."""
    rows = _blur_matrix(image.shape[-2], sigma_px, image.device)
    columns = _blur_matrix(image.shape[-1], sigma_px, image.device)
    return rows @ image @ columns.T


def ellipse(side_px: int) -> Bool[Tensor, "K K"]:
    """Return an elliptical structuring element of odd side.

    Its row at height dy reaches round(sqrt(r^2 - dy^2)) pixels to each side.
    """
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
def _ellipse_boxes(side_px: int) -> tuple[tuple[int, int], ...]:
    """Return the ellipse as a union of centred boxes (half height, half width). Rows narrow away from the middle."""
    halves = _half_widths(side_px // 2)[side_px // 2 :]
    corners = [(height, half) for height, half in enumerate(halves)]
    keep = [corner for corner, following in pairwise(corners) if following[1] < corner[1]]
    return (*keep, corners[-1])


def _dilate_line(mask: Tensor, half: int, dim: int) -> Tensor:
    """Return the OR of all shifts from -half to half along `dim`, computed by doubling."""
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
        length_left = run.shape[dim] - step
        run = run.narrow(dim, 0, length_left) | run.narrow(dim, step, length_left)
        done += step
    return run.narrow(dim, 0, length)


def dilate(mask: Bool[Tensor, "B 1 H W"], side_px: int) -> Bool[Tensor, "B 1 H W"]:
    """Dilate by the ellipse. Outside the image the mask is empty."""
    out = torch.zeros_like(mask)
    for half_height, half_width in _ellipse_boxes(side_px):
        out |= _dilate_line(_dilate_line(mask, half_width, -1), half_height, -2)
    return out


def erode(mask: Bool[Tensor, "B 1 H W"], side_px: int) -> Bool[Tensor, "B 1 H W"]:
    """Erode by the ellipse. The image's edge does not erode the mask."""
    return ~dilate(~mask, side_px)


def open_close(mask: Bool[Tensor, "B 1 H W"], side_px: int) -> Bool[Tensor, "B 1 H W"]:
    """Open and then close by the ellipse."""
    opened = dilate(erode(mask, side_px), side_px)
    return erode(dilate(opened, side_px), side_px)


def stretch(image: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 H W"]:
    """Rescale each image linearly to minimum 0 and maximum 255. A constant image becomes 0."""
    low = image.amin((-2, -1), keepdim=True)
    span = image.amax((-2, -1), keepdim=True) - low
    return (image - low) / span.clamp_min(torch.finfo(image.dtype).tiny) * 255.0


def blob_masks(
    noise: Float[Tensor, "B 1 H W"], *, blur_sigma_px: float, threshold_grey: float, ellipse_px: int
) -> Bool[Tensor, "B 1 H W"]:
    """Run Algorithm 1 on Gaussian noise: blur, stretch to 0..255, binarise above the threshold, open, close.

    Parameters
    ----------
    noise
        Standard normal noise, one image per mask.
    blur_sigma_px
        Standard deviation of the blur.
    threshold_grey
        Grey value in (0, 255). Pixels above it are anomalous. A lower value gives larger blobs.
    ellipse_px
        Side of the elliptical structuring element, odd.
    """
    return open_close(stretch(gaussian_blur(noise, blur_sigma_px)) > threshold_grey, ellipse_px)


@dataclass(frozen=True)
class PerlinLattice:
    """The random numbers of a batch of Perlin noises.

    Attributes
    ----------
    angles_rad
        Direction of each lattice point's unit gradient. Only the first cells + 1 rows and columns of an image's lattice
        are used. The rest is padding.
    cells
        Number of lattice cells along an image's height and width.
    rotation_rad
        Angle by which the noise is rotated about the image's centre.
    """

    angles_rad: Float[Tensor, "B R C"]
    cells: Int64[Tensor, "B 2"]
    rotation_rad: Float[Tensor, " B"]


def draw_lattice(
    generators: Sequence[torch.Generator],
    *,
    scale_exponents: tuple[int, int],
    rotation_deg: tuple[float, float] = (0.0, 0.0),
) -> PerlinLattice:
    """Draw one lattice per generator on the CPU: 2^U{low..high} cells per axis, rotated by U(range).

    Each axis draws its own number of cells.
    """
    low, high = scale_exponents
    drawn = []
    for generator in generators:
        cells = 2 ** torch.randint(low, high + 1, (2,), generator=generator)
        share = torch.rand((), generator=generator)
        angles = torch.rand(*(cells + 1).tolist(), generator=generator) * (2 * pi)
        drawn.append((cells, share, angles))
    cells, share = (torch.stack([image[part] for image in drawn]) for part in (0, 1))
    angles = torch.zeros(len(drawn), *(cells.amax(0) + 1).tolist())
    for row, (_, _, own) in zip(angles, drawn, strict=True):
        row[: own.shape[0], : own.shape[1]] = own
    start, end = (degrees * pi / 180 for degrees in rotation_deg)
    return PerlinLattice(angles, cells, start + (end - start) * share)


def fade(t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return Perlin's blend 6 t^5 - 15 t^4 + 10 t^3 from 0 to 1. Its first two derivatives are 0 at both ends."""
    return t * t * t * (t * (t * 6 - 15) + 10)


def perlin_noise(lattice: PerlinLattice, size_hw: tuple[int, int], device: torch.device) -> Float[Tensor, "B H W"]:
    """Return gradient noise at the pixels' centres, about -1..1 (scaled by sqrt 2, as in DRAEM).

    Pixels that the rotation moves outside the lattice are 0.
    """
    height, width = size_hw
    cells, angle = lattice.cells.to(device), lattice.rotation_rad.to(device)[:, None, None]
    y = torch.arange(height, device=device)[None, :, None] + (0.5 - height / 2)
    x = torch.arange(width, device=device)[None, None, :] + (0.5 - width / 2)
    # in lattice units; the ratio of cells to pixels differs between axes, so pixels are rotated first and then scaled
    down = (y * angle.cos() + x * angle.sin() + height / 2) * (cells[:, 0, None, None] / height)
    right = (x * angle.cos() - y * angle.sin() + width / 2) * (cells[:, 1, None, None] / width)
    last = (cells - 1)[:, :, None, None]
    inside = (down >= 0) & (down <= last[:, 0] + 1) & (right >= 0) & (right <= last[:, 1] + 1)
    row = down.floor().long().clamp_min(0).minimum(last[:, 0])
    column = right.floor().long().clamp_min(0).minimum(last[:, 1])
    down, right = down - row, right - column

    angles = lattice.angles_rad.to(device)
    stride = angles.shape[2]
    gradient_down, gradient_right = angles.sin().flatten(1), angles.cos().flatten(1)

    def corner(row_step: int, column_step: int) -> Tensor:
        at = ((row + row_step) * stride + (column + column_step)).flatten(1)
        dot_down = gradient_down.gather(1, at).view_as(down) * (down - row_step)
        return dot_down + gradient_right.gather(1, at).view_as(right) * (right - column_step)

    along, across = fade(down), fade(right)
    upper = torch.lerp(corner(0, 0), corner(0, 1), across)
    lower = torch.lerp(corner(1, 0), corner(1, 1), across)
    return torch.where(inside, torch.lerp(upper, lower, along) * sqrt(2), 0.0)


def perlin_masks(
    generators: Sequence[torch.Generator],
    size_hw: tuple[int, int],
    *,
    scale_exponents: tuple[int, int] = DRAEM_SCALE_EXPONENTS,
    rotation_deg: tuple[float, float] = DRAEM_ROTATION_DEG,
    threshold: float = DRAEM_THRESHOLD,
    device: torch.device,
) -> Bool[Tensor, "B H W"]:
    """Return DRAEM's masks: rotated Perlin noise of random scale, above `threshold`. Some masks are empty.

    DRAEM rotates the noise as an image, with interpolation. Here the noise is computed exactly at the rotated pixel
    centres, for any image size.
    """
    lattice = draw_lattice(generators, scale_exponents=scale_exponents, rotation_deg=rotation_deg)
    return perlin_noise(lattice, size_hw, device) > threshold
