"""Augmentation of healthy slices: other scanners, contrast phases and vessels, painted into slices as *normal*.

A network trained on few scanners mistakes other noise, sharpness and contrast phases for disease. The changes go into
the query slice and, except for noise, also into the target of the restoration.
"""

from __future__ import annotations

from math import pi

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medad.anomalies.lesions import Scale, draw_centres, smooth_field, soft_inside, uniform
from medad.base.noise import gaussian_blur
from medad.config.anomalies import AugmentationSettings

_CURVE_POINTS = 12


def augment(
    image: Float[Tensor, "B 1 S S"],
    organ: Bool[Tensor, "B 1 S S"],
    scale: Scale,
    settings: AugmentationSettings,
    generator: torch.Generator,
) -> Float[Tensor, "B 1 S S"]:
    """Change offset, contrast, slow inhomogeneity, shade, vessels and rim inside the organ. Grey values are 0..255."""
    batch, _, side, _ = image.shape

    def draw(bounds: tuple[float, float]) -> Float[Tensor, "B 1 1 1"]:
        return uniform(*bounds, (batch, 1, 1, 1), generator)

    shift = draw((-settings.offset_hu, settings.offset_hu)).expand_as(image)
    shift = shift + smooth_field((batch, side, side), settings.field_px, generator)[:, None] * draw(
        (0.0, settings.field_hu)
    )
    if settings.shade_hu != (0, 0):
        shift = shift + shade_hu(organ, scale, settings, generator)
    if settings.vessels > 0:
        shift = shift + vessels_hu(organ, scale, settings, generator)
    if settings.rim_px > 0:
        shift = shift + rim_hu(organ, settings, generator)
    middle = torch.where(organ, image, 0).sum((-2, -1), keepdim=True) / organ.sum((-2, -1), keepdim=True).clamp_min(1)
    gain = torch.exp(draw((-settings.gain_log, settings.gain_log)))
    varied = (image - middle) * gain + middle + shift * scale.grey_per_hu
    return torch.where(organ, varied.clamp(0, 255), image)


def add_noise(
    image: Float[Tensor, "B 1 S S"],
    organ: Bool[Tensor, "B 1 S S"],
    scale: Scale,
    settings: AugmentationSettings,
    generator: torch.Generator,
) -> Float[Tensor, "B 1 S S"]:
    """Add noise of random strength and grain inside the organ, as different scanners, doses and kernels do."""
    batch = len(image)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    grain = uniform(0.0, 1.0, (batch, 1, 1, 1), generator)
    soft = gaussian_blur(noise, settings.grain_px)
    soft = soft / soft.std((-2, -1), keepdim=True).clamp_min(1e-6)
    mixed = noise * (1 - grain) + soft * grain
    mixed = mixed / mixed.std((-2, -1), keepdim=True)
    strength = uniform(*settings.noise_hu, (batch, 1, 1, 1), generator) * scale.grey_per_hu
    return torch.where(organ, (image + mixed * strength).clamp(0, 255), image)


def shade_hu(
    organ: Bool[Tensor, "B 1 S S"], scale: Scale, settings: AugmentationSettings, generator: torch.Generator
) -> Float[Tensor, "B 1 S S"]:
    """Draw a shade in HU: one side of a wavy line through the organ differs from the other, with a gradual change."""
    batch, side = len(organ), organ.shape[-1]
    row, column = (at[..., None, None] for at in draw_centres(organ, 1, generator))
    angle = uniform(0.0, 2 * pi, (batch, 1, 1, 1), generator)
    width = uniform(*settings.shade_mm, (batch, 1, 1, 1), generator, logarithmic=True)
    width = width / scale.pixel_mm[:, None, None, None]
    place = torch.arange(side, device=organ.device, dtype=torch.float32)
    across = (place[:, None] - row) * angle.sin() + (place[None, :] - column) * angle.cos()
    waves = smooth_field((batch, side, side), settings.field_px, generator)[:, None] * width / 4
    return torch.sigmoid(4 * (across + waves) / width) * uniform(*settings.shade_hu, (batch, 1, 1, 1), generator)


def vessels_hu(
    organ: Bool[Tensor, "B 1 S S"], scale: Scale, settings: AugmentationSettings, generator: torch.Generator
) -> Float[Tensor, "B 1 S S"]:
    """Draw curved vessels in HU. Most vessels of a slice have the same strength, as in one contrast phase."""
    batch, side, most = len(organ), organ.shape[-1], settings.vessels
    row, column = draw_centres(organ, most, generator)
    count = torch.randint(0, most + 1, (batch, 1), generator=generator, device=organ.device)
    shown = torch.arange(most, device=organ.device)[None] < count
    shape = (batch, most)
    radius = uniform(*settings.vessel_mm, shape, generator, logarithmic=True) / 2 / scale.pixel_mm[:, None]
    length = radius * uniform(*settings.vessel_length, shape, generator, logarithmic=True)
    angle = uniform(0.0, 2 * pi, shape, generator)
    bend = uniform(-0.4, 0.4, shape, generator)
    along = torch.linspace(-1, 1, _CURVE_POINTS, device=organ.device)[None, None] * length[..., None]
    sideways = bend[..., None] * along * along / length[..., None].clamp_min(1e-3)
    down = row[..., None] + along * angle.cos()[..., None] - sideways * angle.sin()[..., None]
    right = column[..., None] + along * angle.sin()[..., None] + sideways * angle.cos()[..., None]
    place = torch.arange(side, device=organ.device, dtype=torch.float32)
    distance = torch.full((batch, most, side, side), float("inf"), device=organ.device)
    for point in range(_CURVE_POINTS - 1):
        distance = torch.minimum(distance, _distance_to_segment(place, down, right, point))
    inside = soft_inside(distance - radius[..., None, None], torch.full_like(distance[..., :1, :1], 0.5))
    common = uniform(*settings.vessel_hu, (batch, 1), generator)
    individual = uniform(*settings.vessel_hu, shape, generator)
    strength = torch.where(uniform(0.0, 1.0, shape, generator) < 0.8, common, individual) * shown
    painted = inside * strength[..., None, None]
    strongest = painted.abs().argmax(1, keepdim=True)
    return painted.gather(1, strongest)


def _distance_to_segment(
    place: Float[Tensor, " S"], down: Float[Tensor, "B K P"], right: Float[Tensor, "B K P"], point: int
) -> Float[Tensor, "B K S S"]:
    """Return the distance of every pixel to the segment from a curve's `point` to its next point, in pixels."""
    y0, x0 = down[..., point, None, None], right[..., point, None, None]
    dy, dx = down[..., point + 1, None, None] - y0, right[..., point + 1, None, None] - x0
    y, x = place[None, None, :, None] - y0, place[None, None, None, :] - x0
    t = ((y * dy + x * dx) / (dy * dy + dx * dx).clamp_min(1e-6)).clamp(0, 1)
    return torch.hypot(y - t * dy, x - t * dx)


def rim_hu(
    organ: Bool[Tensor, "B 1 S S"], settings: AugmentationSettings, generator: torch.Generator
) -> Float[Tensor, "B 1 S S"]:
    """Draw an uneven change in HU along the organ's outline, where masks are inaccurate and tissue is mixed."""
    batch, _, side, _ = organ.shape
    outside = (~organ).float()
    near = gaussian_blur(outside, settings.rim_px / 2) * 2
    uneven = torch.sigmoid(2 * smooth_field((batch, side, side), 4 * settings.rim_px, generator))[:, None]
    strength = uniform(*settings.rim_hu, (batch, 1, 1, 1), generator)
    return torch.where(organ, near.clamp(0, 1) * uneven * strength, 0.0)
