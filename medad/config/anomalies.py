"""Settings of what is painted into healthy slices: pseudo anomalies and normal variation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medad.base.private import DataRoot
from medad.base.settings import Settings

MOST_SCALE_EXPONENT = 8
"""2^8 lattice cells a side: one a pixel at the thesis's 256 px."""


class LesionSettings(Settings):
    """Pseudo lesions in HU (`medad.anomalies.lesions`); slices must be linear in HU (`preprocess.equalise: false`)."""

    most: Annotated[int, Field(ge=1, le=8)] = 3
    """Lesions in a slice, 1 to so many."""
    empty_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of slices that stay healthy."""
    diameter_mm: tuple[float, float] = (4.0, 100.0)
    """Longest axis of the cut, log-uniform."""
    shortest_axis: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least ratio of the two axes."""
    contrast_hu: tuple[float, float] = (12.0, 120.0)
    """Size of the contrast, log-uniform."""
    bright_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    mixed_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    edge_mm: tuple[float, float] = (0.5, 4.0)
    """Standard deviation of the Gaussian that softens the outline."""
    unevenness: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Standard deviation, at most, of the outline's relative distance from the ellipse."""
    outline_px: tuple[float, float] = (2.0, 8.0)
    """Over how many pixels outline and texture change, in small and in large lesions."""
    texture_hu: tuple[float, float] = (0.0, 15.0)


class VariationSettings(Settings):
    """Normal variation painted into healthy slices (`medad.anomalies.augment`); slices must be linear in HU."""

    offset_hu: Annotated[float, Field(ge=0)] = 8.0
    gain_log: Annotated[float, Field(ge=0)] = 0.2
    """Contrast within the liver is multiplied by exp of up to this, either way."""
    field_hu: Annotated[float, Field(ge=0)] = 8.0
    """Standard deviation, at most, of a slow inhomogeneity."""
    field_px: Annotated[float, Field(gt=0)] = 16.0
    shade_hu: tuple[float, float] = (-40.0, 25.0)
    """How much one side of a slice differs from the other: hardened beams, arms in the field, uneven fat."""
    shade_mm: tuple[float, float] = (6.0, 60.0)
    """Over how many mm that sets in, log-uniform."""
    vessels: Annotated[int, Field(ge=0, le=16)] = 6
    """At most so many painted vessels."""
    vessel_mm: tuple[float, float] = (3.0, 14.0)
    vessel_length: tuple[float, float] = (2.0, 16.0)
    """Half a vessel's length, in radii."""
    vessel_hu: tuple[float, float] = (-40.0, 90.0)
    rim_px: Annotated[float, Field(ge=0)] = 2.0
    rim_hu: tuple[float, float] = (-60.0, 30.0)
    noise_hu: tuple[float, float] = (0.0, 20.0)
    grain_px: Annotated[float, Field(gt=0)] = 1.0


class TextureSettings(Settings):
    """DRAEM's pseudo anomalies: a texture laid, half transparent, over a Perlin mask (Zavrtanik et al., 2021)."""

    folder: DataRoot | None = None
    """A folder of pictures (such as DTD), read as grey. None: textures are generated."""
    opacity: tuple[float, float] = (0.2, 1.0)
    """Range of the texture's opacity, drawn evenly: DRAEM's 1 - beta, beta ~ U(0, 0.8)."""
    scale_exponents: tuple[int, int] = (0, 5)
    """A mask's noise has 2^U{low..high} lattice cells along each axis, each axis by itself."""
    threshold: float = 0.5
    """Noise, about -1..1, above this is anomalous. Lower gives larger anomalies."""
    clean_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of slices that stay as they are, with an empty mask; DRAEM's public code: one half."""

    @model_validator(mode="after")
    def _ranges(self) -> TextureSettings:
        if not 0 <= self.opacity[0] <= self.opacity[1] <= 1:
            raise ValueError("opacity must be (low, high) with 0 <= low <= high <= 1")
        if not 0 <= self.scale_exponents[0] <= self.scale_exponents[1] <= MOST_SCALE_EXPONENT:
            raise ValueError(f"scale_exponents must be (low, high) with 0 <= low <= high <= {MOST_SCALE_EXPONENT}")
        return self


class SynthesisSettings(Settings):
    """Algorithm 1 and the meant eq. 3.1; DRAEM's Perlin masks and textures; or lesions in HU."""

    kind: Literal["blobs", "perlin_texture", "lesions"] = "blobs"
    """`blobs`: one grey shift in blobs of blurred noise, by the settings below (the thesis). `perlin_texture`: a
    texture in Perlin masks, by the group `texture` alone (DRAEM, the thesis's baseline). `lesions`: by the group
    `lesions` alone."""
    texture: TextureSettings = TextureSettings()
    lesions: LesionSettings = LesionSettings()
    blur_sigma_px: Annotated[float, Field(gt=0)] = 15.0
    threshold_grey: Annotated[float, Field(gt=0, lt=255)] = 200.0
    ellipse_px: Annotated[int, Field(ge=1, le=63)] = 9
    """Side of the elliptical structuring element; odd."""
    shift_grey: tuple[float, float] = (60.0, 100.0)
    """Range of |C|, the constant added inside the mask; the sign is drawn with it."""
    shift_distribution: Literal["uniform", "normal"] = "uniform"
    """`normal`: zero mean, sd = half the upper limit, truncated to the range."""

    @model_validator(mode="after")
    def _ranges(self) -> SynthesisSettings:
        if not 0 <= self.shift_grey[0] < self.shift_grey[1] <= 255:
            raise ValueError("shift_grey must be (low, high) with 0 <= low < high <= 255")
        if self.ellipse_px % 2 == 0:
            raise ValueError("ellipse_px must be odd")
        return self
