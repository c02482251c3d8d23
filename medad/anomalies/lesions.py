"""Pseudo lesions of known size and contrast in HU, painted into slices in batches on the training device.

Algorithm 1 of the thesis shifts equalised grey values in blobs. These lesions look like liver tumours in CT. Their
sizes range from a few millimetres to most of a lobe. They are darker than the liver, brighter, or both, with soft edges
and an uneven inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi, sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medad.base.noise import gaussian_blur
from medad.config.anomalies import LesionSettings

_MAX_CONTRAST_GROWTH = 0.5
"""Largest growth of a lesion's contrast from its edge to its centre, as a fraction."""


@dataclass(frozen=True)
class Scale:
    """Scale of each slice.

    Attributes
    ----------
    pixel_mm
        Side of a pixel, in mm.
    grey_per_hu
        Number of grey values per Hounsfield unit.
    """

    pixel_mm: Float[Tensor, " B"]
    grey_per_hu: float


def uniform(
    low: float, high: float, shape: tuple[int, ...], generator: torch.Generator, *, logarithmic: bool = False
) -> Float[Tensor, "*S"]:
    """Draw independent numbers from [low, high], uniform in the value or, for positive bounds, in its logarithm."""
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    if logarithmic:
        return torch.exp(log(low) + (log(high) - log(low)) * drawn)
    return low + (high - low) * drawn


def smooth_field(shape: tuple[int, int, int], sigma_px: float, generator: torch.Generator) -> Float[Tensor, "N S S"]:
    """Draw random fields, each with mean 0 and standard deviation 1, correlated over about `sigma_px`."""
    noise = torch.randn((shape[0], 1, *shape[1:]), generator=generator, device=generator.device)
    field = gaussian_blur(noise, sigma_px)[:, 0] if sigma_px > 0 else noise[:, 0]
    field = field - field.mean((-2, -1), keepdim=True)
    return field / field.std((-2, -1), keepdim=True).clamp_min(1e-6)


def soft_inside(distance_px: Float[Tensor, "*S"], edge_px: Float[Tensor, "*#S"]) -> Float[Tensor, "*S"]:
    """Return a step blurred by a Gaussian: 1 inside (negative distance), one half on the surface, 0 outside."""
    return torch.erfc(distance_px / (sqrt(2) * edge_px.clamp_min(1e-3))) / 2


def draw_centres(
    organ: Bool[Tensor, "B 1 S S"], count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Draw `count` pixels of each slice's organ uniformly and return their rows and columns.

    A slice without organ gives pixels of the whole slice.
    """
    side = organ.shape[-1]
    weight = organ.flatten(1).float()
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1.0)
    at = torch.multinomial(weight, count, replacement=True, generator=generator)
    return (at // side).float(), (at % side).float()


def paint_lesions(
    image: Float[Tensor, "B 1 S S"],
    organ: Bool[Tensor, "B 1 S S"],
    scale: Scale,
    settings: LesionSettings,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "B 1 S S"], Bool[Tensor, "B 1 S S"]]:
    """Paint 0 to `settings.most` lesions into each slice.

    A lesion is an ellipse with an uneven outline. The added HU are its contrast times a profile with a soft edge, only
    inside the organ. Dark and bright lesions have a contrast of one sign that grows to the centre. Mixed lesions also
    have patches with a second contrast, positive or negative. All lesions have a texture.

    Parameters
    ----------
    image
        Healthy slices, grey values linear in HU, 0..255.
    organ
        Mask of the liver. Nothing changes outside it.
    scale
        Millimetres per pixel and grey values per HU.

    Returns
    -------
    The slices, clipped to 0..255, and the mask of the lesions: inside their outlines and the organ.
    """
    batch, _, side, _ = image.shape
    most = settings.most
    total, device = batch * most, image.device

    def draw(low: float, high: float, *, logarithmic: bool = False) -> Float[Tensor, " N"]:
        return uniform(low, high, (total,), generator, logarithmic=logarithmic)

    count = torch.randint(1, most + 1, (batch,), generator=generator, device=device)
    count = torch.where(uniform(0.0, 1.0, (batch,), generator) < settings.empty_share, 0, count)
    painted = (torch.arange(most, device=device)[None] < count[:, None]).flatten()

    row, column = (each.flatten()[:, None, None] for each in draw_centres(organ, most, generator))
    pixel_mm = scale.pixel_mm.repeat_interleave(most)
    radius = draw(*settings.diameter_mm, logarithmic=True) / 2 / pixel_mm
    other = radius * draw(settings.shortest_axis, 1.0)
    angle = draw(0.0, pi)[:, None, None]
    edge = (draw(*settings.edge_mm) / pixel_mm)[:, None, None]
    place = torch.arange(side, device=device, dtype=torch.float32)
    down, right = place[None, :, None] - row, place[None, None, :] - column
    first = (down * angle.cos() + right * angle.sin()) / radius[:, None, None]
    second = (right * angle.cos() - down * angle.sin()) / other[:, None, None]
    reach = torch.hypot(first, second)
    fine = smooth_field((total, side, side), settings.outline_px[0], generator)
    coarse = smooth_field((total, side, side), settings.outline_px[1], generator)
    large = (radius[:, None, None] / settings.outline_px[1]).clamp(0, 1)
    bump = (fine * (1 - large) + coarse * large) * (settings.unevenness * draw(0.0, 1.0))[:, None, None]
    distance = (reach - 1 - bump) * other[:, None, None]
    inside = soft_inside(distance, edge) * painted[:, None, None]

    contrast = _contrast(reach, fine, coarse, large, settings, draw)
    contrast += fine * draw(*settings.texture_hu)[:, None, None]
    added = (inside * contrast).view(batch, most, side, side)
    covered = (inside.view(batch, most, side, side) > 0.5).any(1, keepdim=True)
    shift = added.sum(1, keepdim=True) * scale.grey_per_hu
    return torch.where(organ, (image + shift).clamp(0, 255), image), covered & organ


def _contrast(
    reach: Float[Tensor, "N S S"],
    fine: Float[Tensor, "N S S"],
    coarse: Float[Tensor, "N S S"],
    large: Float[Tensor, "N 1 1"],
    settings: LesionSettings,
    draw: Callable[..., Float[Tensor, " N"]],
) -> Float[Tensor, "N S S"]:
    """Return the HU to add at each pixel, before the lesion's soft profile is applied."""
    kind, bright = draw(0.0, 1.0), draw(0.0, 1.0) < settings.bright_share
    size = draw(*settings.contrast_hu, logarithmic=True)
    main = torch.where(bright, size, -size)[:, None, None]
    main = main * (1 + draw(0.0, _MAX_CONTRAST_GROWTH)[:, None, None] * (1 - reach).clamp_min(0))
    part = draw(*settings.contrast_hu, logarithmic=True) * torch.where(draw(0.0, 1.0) < 0.5, 1.0, -1.0)
    # a fifth to a half of the inside, in patches that are larger in larger lesions
    patches = torch.sigmoid(((fine * (1 - large) + coarse * large) - draw(0.0, 0.8)[:, None, None]) * 4)
    mixed = main + (part[:, None, None] - main) * patches
    return torch.where((kind < settings.mixed_share)[:, None, None], mixed, main)
