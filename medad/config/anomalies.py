"""Settings of what is painted into healthy slices: pseudo anomalies and augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medad.base.private import DataRoot
from medad.base.settings import Settings

MAX_SCALE_EXPONENT = 8
"""2^8 lattice cells a side: one a pixel at the thesis's 256 px."""


class LesionSettings(Settings):
    """Pseudo lesions in HU (`medad.anomalies.lesions`); slices must be linear in HU (`preprocess.equalise: false`)."""

    most: Annotated[int, Field(ge=1, le=8)] = 3
    """Largest number of lesions in a slice; the number is uniform from 1."""
    empty_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of slices that stay healthy."""
    diameter_mm: tuple[float, float] = (4.0, 100.0)
    """Range of the longest axis, log-uniform."""
    shortest_axis: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Smallest ratio of the short axis to the long one."""
    contrast_hu: tuple[float, float] = (12.0, 120.0)
    """Range of the contrast's size, log-uniform."""
    bright_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    """Share of lesions that are brighter than the liver."""
    mixed_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    """Share of lesions with parts of a second contrast."""
    edge_mm: tuple[float, float] = (0.5, 4.0)
    """Range of the standard deviation of the Gaussian that softens the outline."""
    unevenness: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Largest standard deviation of the outline's distance from an ellipse, relative to the ellipse."""
    outline_px: tuple[float, float] = (2.0, 8.0)
    """Pixels over which outline and texture change, in small and in large lesions."""
    texture_hu: tuple[float, float] = (0.0, 15.0)
    """Range of the texture's standard deviation."""


class AugmentationSettings(Settings):
    """Augmentation of healthy slices (`medad.anomalies.augment`); slices must be linear in HU."""

    offset_hu: Annotated[float, Field(ge=0)] = 8.0
    """Largest offset of the whole liver, in either direction."""
    gain_log: Annotated[float, Field(ge=0)] = 0.2
    """Largest logarithm of the factor on the contrast within the liver, in either direction."""
    field_hu: Annotated[float, Field(ge=0)] = 8.0
    """Largest standard deviation of a slow inhomogeneity."""
    field_px: Annotated[float, Field(gt=0)] = 16.0
    """Pixels over which the inhomogeneity changes."""
    shade_hu: tuple[float, float] = (-40.0, 25.0)
    """Range of the difference between two sides of a slice: hardened beams, arms in the field, uneven fat."""
    shade_mm: tuple[float, float] = (6.0, 60.0)
    """Range of the width over which the difference sets in, log-uniform."""
    vessels: Annotated[int, Field(ge=0, le=16)] = 6
    """Largest number of painted vessels."""
    vessel_mm: tuple[float, float] = (3.0, 14.0)
    """Range of a vessel's diameter, log-uniform."""
    vessel_length: tuple[float, float] = (2.0, 16.0)
    """Range of half a vessel's length, in radii, log-uniform."""
    vessel_hu: tuple[float, float] = (-40.0, 90.0)
    """Range of a vessel's contrast."""
    rim_px: Annotated[float, Field(ge=0)] = 2.0
    """Width of the changed rim of the liver. 0: no rim is changed."""
    rim_hu: tuple[float, float] = (-60.0, 30.0)
    """Range of the rim's contrast."""
    noise_hu: tuple[float, float] = (0.0, 20.0)
    """Range of the noise's standard deviation."""
    grain_px: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the Gaussian that makes noise grainy."""


class TextureSettings(Settings):
    """DRAEM's pseudo anomalies: a texture laid, half transparent, over a Perlin mask (Zavrtanik et al., 2021)."""

    folder: DataRoot | None = None
    """Folder of pictures (such as DTD), read as grey. None: textures are generated."""
    opacity: tuple[float, float] = (0.2, 1.0)
    """Range of the texture's opacity, uniform: DRAEM's 1 - beta, with beta ~ U(0, 0.8)."""
    scale_exponents: tuple[int, int] = (0, 5)
    """Range of the exponents of 2 that give a mask's lattice cells, each axis by itself."""
    threshold: float = 0.5
    """Noise, about -1 to 1, above which a pixel is anomalous. A lower value gives larger anomalies."""
    clean_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of slices that stay as they are, with an empty mask. DRAEM's public code has one half."""

    @model_validator(mode="after")
    def _ranges(self) -> TextureSettings:
        if not 0 <= self.opacity[0] <= self.opacity[1] <= 1:
            raise ValueError("opacity must be (low, high) with 0 <= low <= high <= 1")
        if not 0 <= self.scale_exponents[0] <= self.scale_exponents[1] <= MAX_SCALE_EXPONENT:
            raise ValueError(f"scale_exponents must be (low, high) with 0 <= low <= high <= {MAX_SCALE_EXPONENT}")
        return self


class SynthesisSettings(Settings):
    """Algorithm 1 and the meant eq. 3.1; DRAEM's Perlin masks and textures; or lesions in HU."""

    kind: Literal["blobs", "perlin_texture", "lesions"] = "blobs"
    """Kind of pseudo anomaly. `blobs`: one grey shift in blobs of blurred noise (the thesis). `perlin_texture`: a
    texture in Perlin masks, by `texture` alone (DRAEM). `lesions`: lesions in HU, by `lesions` alone."""
    texture: TextureSettings = TextureSettings()
    """Settings of kind `perlin_texture`."""
    lesions: LesionSettings = LesionSettings()
    """Settings of kind `lesions`."""
    blur_sigma_px: Annotated[float, Field(gt=0)] = 15.0
    """Standard deviation of the Gaussian that blurs the noise."""
    threshold_grey: Annotated[float, Field(gt=0, lt=255)] = 200.0
    """Grey value of the blurred noise, stretched to 0..255, above which a pixel is anomalous."""
    ellipse_px: Annotated[int, Field(ge=1, le=63)] = 9
    """Side of the elliptical structuring element; odd."""
    shift_grey: tuple[float, float] = (60.0, 100.0)
    """Range of |C|, the constant added inside the mask. Its sign is random."""
    shift_distribution: Literal["uniform", "normal"] = "uniform"
    """Distribution of the shift. `normal`: zero mean, a standard deviation of half the upper limit, truncated to the
    range."""

    @model_validator(mode="after")
    def _ranges(self) -> SynthesisSettings:
        if not 0 <= self.shift_grey[0] < self.shift_grey[1] <= 255:
            raise ValueError("shift_grey must be (low, high) with 0 <= low < high <= 255")
        if self.ellipse_px % 2 == 0:
            raise ValueError("ellipse_px must be odd")
        return self
