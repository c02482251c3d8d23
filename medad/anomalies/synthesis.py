"""Pseudo anomalies in the liver, in batches on the training device.

They are those of the thesis (Zhang, University of Alberta, 2024; section 3.3.1) and those of DRAEM.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erf, sqrt

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from medad.anomalies.lesions import Scale, paint_lesions
from medad.anomalies.textures import Textures, open_textures
from medad.base.noise import blob_masks, perlin_masks
from medad.config.anomalies import SynthesisSettings, TextureSettings


@dataclass(frozen=True)
class Synthesised:
    """A batch of pseudo-anomalous slices.

    Attributes
    ----------
    image
        Grey values in [0, 255].
    mask
        Mask of the anomaly. It may be empty. Algorithm 1 then labels the slice normal.
    """

    image: Float[Tensor, "B 1 S S"]
    mask: Bool[Tensor, "B 1 S S"]

    def take(self, rows: Int64[Tensor, " N"]) -> Synthesised:
        """Return some slices of the batch."""
        return Synthesised(self.image[rows], self.mask[rows])


def draw_shift(batch: int, settings: SynthesisSettings, generator: torch.Generator) -> Float[Tensor, "B 1 1 1"]:
    """Draw one constant C per image, positive or negative, with |C| within `shift_grey` (eq. 3.1).

    The thesis calls C Gaussian "within a defined range" but gives no standard deviation, so uniform is the default.
    Each image uses exactly one uniform number for both distributions (inverse CDF). No draw is ever repeated.
    """
    low, high = settings.shift_grey
    uniform = torch.rand(batch, 1, 1, 1, generator=generator, device=generator.device) * 2 - 1
    size = uniform.abs()
    if settings.shift_distribution == "uniform":
        magnitude = low + (high - low) * size
    else:
        scale = sqrt(2) * high / 2
        cdf_low, cdf_high = erf(low / scale), erf(high / scale)
        magnitude = (torch.erfinv(cdf_low + (cdf_high - cdf_low) * size) * scale).clamp(low, high)
    return torch.copysign(magnitude, uniform)


def add_shift(
    image: Float[Tensor, "B 1 S S"], mask: Bool[Tensor, "B 1 S S"], shift_grey: Float[Tensor, "B 1 1 1"]
) -> Float[Tensor, "B 1 S S"]:
    """Return I_s = M * (I + C) + (1 - M) * I, clipped to [0, 255].

    Eq. 3.1 is printed with the two masks swapped, which would shift everything except the anomaly. The text and figure
    3.2 show the intended equation.
    """
    return torch.where(mask, (image + shift_grey).clamp(0.0, 255.0), image)


def blend(
    image: Float[Tensor, "B 1 S S"],
    mask: Bool[Tensor, "B 1 S S"],
    texture: Float[Tensor, "B 1 S S"],
    opacity: Float[Tensor, "B 1 1 1"],
) -> Float[Tensor, "B 1 S S"]:
    """Return DRAEM's I_s = M * ((1 - beta) * A + beta * I) + (1 - M) * I, with `opacity` = 1 - beta in 0..1."""
    return torch.where(mask, torch.lerp(image, texture, opacity), image)


def synthesise(
    image: Float[Tensor, "B 1 S S"],
    organ: Bool[Tensor, "B 1 S S"],
    settings: SynthesisSettings,
    generator: torch.Generator,
    textures: Textures | None = None,
    scale: Scale | None = None,
) -> Synthesised:
    """Paint a pseudo anomaly into each slice's liver.

    Parameters
    ----------
    image
        Healthy slices, grey values in [0, 255], on the generator's device.
    organ
        Mask of the liver. Anomalies are always inside it.
    settings
        Shapes and contrasts.
    generator
        Source of all randomness. Equal states give equal batches.
    textures
        Textures of `settings.texture` for kind `perlin_texture`. None: they are opened here.
    scale
        Scale of the slices, required for kind `lesions`.
    """
    if settings.kind == "lesions":
        assert scale is not None
        return Synthesised(*paint_lesions(image, organ, scale, settings.lesions, generator))
    if settings.kind == "perlin_texture":
        opened = textures or open_textures(settings.texture, image.shape[-1])
        return _paint_textures(image, organ, settings.texture, generator, opened)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    mask = organ & blob_masks(
        noise,
        blur_sigma_px=settings.blur_sigma_px,
        threshold_grey=settings.threshold_grey,
        ellipse_px=settings.ellipse_px,
    )
    return Synthesised(add_shift(image, mask, draw_shift(len(image), settings, generator)), mask)


def _paint_textures(
    image: Float[Tensor, "B 1 S S"],
    organ: Bool[Tensor, "B 1 S S"],
    settings: TextureSettings,
    generator: torch.Generator,
    textures: Textures,
) -> Synthesised:
    """Paint textures in Perlin masks inside the liver. Each slice has its own generator on the CPU."""
    seeds = torch.randint(2**62, (len(image),), generator=generator, device=generator.device).tolist()
    image_generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = torch.stack([torch.rand(2, generator=each) for each in image_generators]).to(image.device)[
        :, :, None, None, None
    ]
    low, high = settings.opacity
    opacity = low + (high - low) * drawn[:, 0]
    mask = perlin_masks(
        image_generators,
        (image.shape[-2], image.shape[-1]),
        scale_exponents=settings.scale_exponents,
        threshold=settings.threshold,
        device=image.device,
    )[:, None]
    mask = mask & organ & (drawn[:, 1] >= settings.clean_share)
    return Synthesised(blend(image, mask, textures.draw(image_generators, image.device), opacity), mask)
