"""Pseudo anomalies inside the liver (000, section 3.3.1), batched on the training device."""

from __future__ import annotations

from dataclasses import dataclass
from math import erf, sqrt

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from medad.config import SynthesisSettings
from medad.noise import blob_masks


@dataclass(frozen=True)
class Synthesised:
    """A batch of pseudo-anomalous slices.

    Attributes
    ----------
    image
        Grey values in [0, 255].
    mask
        Where the anomaly is. May be empty: Algorithm 1 then labels the slice normal.
    """

    image: Float[Tensor, "B 1 S S"]
    mask: Bool[Tensor, "B 1 S S"]

    def take(self, rows: Int64[Tensor, " N"]) -> Synthesised:
        """Some slices of the batch."""
        return Synthesised(self.image[rows], self.mask[rows])


def draw_shift(batch: int, settings: SynthesisSettings, generator: torch.Generator) -> Float[Tensor, "B 1 1 1"]:
    """One constant C for each image, of either sign, |C| within `shift_grey` (eq. 3.1).

    The text calls C Gaussian "within a defined range" without giving its sd, so uniform is the default. One uniform
    number an image is used whatever the distribution (inverse CDF), so no draw is ever repeated.
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


def overlay(
    image: Float[Tensor, "B 1 S S"], mask: Bool[Tensor, "B 1 S S"], shift_grey: Float[Tensor, "B 1 1 1"]
) -> Float[Tensor, "B 1 S S"]:
    """I_s = M * (I + C) + (1 - M) * I, clipped to [0, 255].

    Eq. 3.1 prints the two masks swapped, which would shift everything but the anomaly; the text and figure 3.2 show
    what is meant.
    """
    return torch.where(mask, (image + shift_grey).clamp(0.0, 255.0), image)


def synthesise(
    image: Float[Tensor, "B 1 S S"],
    organ: Bool[Tensor, "B 1 S S"],
    settings: SynthesisSettings,
    generator: torch.Generator,
) -> Synthesised:
    """Paint a pseudo anomaly into each slice's liver.

    Parameters
    ----------
    image
        Healthy slices, grey values in [0, 255], on the generator's device.
    organ
        Liver; anomalies lie wholly inside it.
    settings
        Shapes and contrasts.
    generator
        Source of all randomness; equal states give equal batches.
    """
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    mask = organ & blob_masks(
        noise,
        blur_sigma_px=settings.blur_sigma_px,
        threshold_grey=settings.threshold_grey,
        ellipse_px=settings.ellipse_px,
    )
    return Synthesised(overlay(image, mask, draw_shift(len(image), settings, generator)), mask)
