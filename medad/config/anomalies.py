"""Settings of the changes painted into healthy slices: pseudo anomalies and augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medad.base.private import DataRoot
from medad.base.settings import Settings

MAX_SCALE_EXPONENT = 8
"""Largest exponent. With 2^8 lattice cells per side, each pixel is one cell at the thesis's 256 px."""


class LesionSettings(Settings):
    """Pseudo lesions painted in HU. Slices must be linear in HU (`preprocess.equalise: false`)."""

    most: Annotated[int, Field(ge=1, le=8)] = 3
    """Largest number of lesions in a slice. The number is drawn uniformly from 1 to this value."""
    empty_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of slices that get no lesion."""
    diameter_mm: tuple[float, float] = (4.0, 100.0)
    """Range of the longest axis, in mm, log-uniform."""
    shortest_axis: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Smallest ratio of the short axis to the long axis."""
    contrast_hu: tuple[float, float] = (12.0, 120.0)
    """Range of the absolute contrast to the liver, in HU, log-uniform."""
    bright_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    """Share of lesions that are brighter than the liver. The others are darker."""
    mixed_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    """Share of lesions with patches of a second contrast."""
    edge_mm: tuple[float, float] = (0.5, 4.0)
    """Range of the standard deviation of the Gaussian that softens the outline, in mm."""
    unevenness: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Largest standard deviation of the outline's distance from an ellipse, as a fraction of the ellipse's radius."""
    outline_px: tuple[float, float] = (2.0, 8.0)
    """Length over which outline and texture change, in pixels: for small lesions and for large lesions."""
    texture_hu: tuple[float, float] = (0.0, 15.0)
    """Range of the texture's standard deviation, in HU."""


class SolidLesionSettings(Settings):
    """Pseudo lesions in three dimensions, in HU. Slices must be linear in HU (`preprocess.equalise: false`)."""

    copies: Annotated[int, Field(ge=1, le=200)] = 24
    """Number of copies of each healthy scan, each with other lesions."""
    most: Annotated[int, Field(ge=1, le=20)] = 8
    """Largest number of lesions in a copy. The number is drawn uniformly from 1 to this value."""
    diameter_mm: tuple[float, float] = (6.0, 90.0)
    """Range of the longest axis, in mm, log-uniform."""
    shortest_axis: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Smallest ratio of a short axis to the long axis."""
    contrast_hu: tuple[float, float] = (8.0, 90.0)
    """Range of the absolute contrast to the liver, in HU, log-uniform."""
    bright_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    """Share of lesions that are brighter than the liver. The others are darker."""
    mixed_share: Annotated[float, Field(ge=0, le=1)] = 0.33
    """Share of lesions with patches of a second contrast."""
    ring_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of lesions with a ring of a second contrast below their surface."""
    edge_mm: tuple[float, float] = (0.5, 4.0)
    """Range of the standard deviation of the Gaussian that softens the outline, in mm."""
    unevenness: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Largest standard deviation of the outline's distance from an ellipsoid, as a fraction of the radius."""
    texture_hu: tuple[float, float] = (0.0, 12.0)
    """Range of the texture's standard deviation, in HU."""
    largest_share: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Largest share of the liver that the lesions of one copy cover. Further lesions are left out."""

    @model_validator(mode="after")
    def _ranges(self) -> SolidLesionSettings:
        for name in ("diameter_mm", "contrast_hu", "edge_mm"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high")
        if not 0 <= self.texture_hu[0] <= self.texture_hu[1]:
            raise ValueError("texture_hu must be (low, high) with 0 <= low <= high")
        return self


class AugmentationSettings(Settings):
    """Augmentation of healthy slices. Slices must be linear in HU (`preprocess.equalise: false`)."""

    offset_hu: Annotated[float, Field(ge=0)] = 8.0
    """Limit of the random offset of the whole liver, in HU. The offset is between -offset_hu and +offset_hu."""
    gain_log: Annotated[float, Field(ge=0)] = 0.2
    """Limit of the random contrast factor within the liver: its natural logarithm is between -gain_log and +gain_log.
    0.2 means factors from 0.82 to 1.22."""
    field_hu: Annotated[float, Field(ge=0)] = 8.0
    """Largest standard deviation of a slow inhomogeneity, in HU."""
    field_px: Annotated[float, Field(gt=0)] = 16.0
    """Length over which the inhomogeneity changes, in pixels."""
    shade_hu: tuple[float, float] = (-40.0, 25.0)
    """Range of the difference between two sides of a slice, in HU. Beam hardening, arms in the field and uneven fat
    cause such differences."""
    shade_mm: tuple[float, float] = (6.0, 60.0)
    """Range of the width of the transition between the two sides, in mm, log-uniform."""
    vessels: Annotated[int, Field(ge=0, le=16)] = 6
    """Largest number of painted vessels in a slice."""
    vessel_mm: tuple[float, float] = (3.0, 14.0)
    """Range of a vessel's diameter, in mm, log-uniform."""
    vessel_length: tuple[float, float] = (2.0, 16.0)
    """Range of half a vessel's length, as a multiple of its radius, log-uniform."""
    vessel_hu: tuple[float, float] = (-40.0, 90.0)
    """Range of a vessel's contrast to the liver, in HU."""
    rim_px: Annotated[float, Field(ge=0)] = 2.0
    """Width of the rim of the liver that is changed, in pixels. 0: the rim is not changed."""
    rim_hu: tuple[float, float] = (-60.0, 30.0)
    """Range of the rim's contrast to the liver, in HU."""
    noise_hu: tuple[float, float] = (0.0, 20.0)
    """Range of the noise's standard deviation, in HU."""
    grain_px: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the Gaussian that makes the noise grainy, in pixels."""

    @model_validator(mode="after")
    def _ranges(self) -> AugmentationSettings:
        for name in ("shade_mm", "vessel_mm", "vessel_length"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high")
        for name in ("shade_hu", "vessel_hu", "rim_hu", "noise_hu"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (low, high) with low <= high")
        return self


class TextureSettings(Settings):
    """DRAEM's pseudo anomalies: a semi-transparent texture inside a Perlin mask (Zavrtanik et al., 2021)."""

    folder: DataRoot | None = None
    """Folder of pictures (such as DTD), which are read as grey values. None: textures are generated."""
    opacity: tuple[float, float] = (0.2, 1.0)
    """Range of the texture's opacity, uniform. It is DRAEM's 1 - beta with beta ~ U(0, 0.8)."""
    scale_exponents: tuple[int, int] = (0, 5)
    """Range of exponents e for the mask's noise, which has 2^e lattice cells per side. Each axis draws its own e."""
    threshold: float = 0.5
    """Noise value (noise is about -1 to 1) above which a pixel is anomalous. A lower value gives larger anomalies."""
    clean_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of slices that stay unchanged and have an empty mask. DRAEM's public code uses one half."""

    @model_validator(mode="after")
    def _ranges(self) -> TextureSettings:
        if not 0 <= self.opacity[0] <= self.opacity[1] <= 1:
            raise ValueError("opacity must be (low, high) with 0 <= low <= high <= 1")
        if not 0 <= self.scale_exponents[0] <= self.scale_exponents[1] <= MAX_SCALE_EXPONENT:
            raise ValueError(f"scale_exponents must be (low, high) with 0 <= low <= high <= {MAX_SCALE_EXPONENT}")
        return self


class SynthesisSettings(Settings):
    """Pseudo anomalies: the thesis's blobs (Algorithm 1, eq. 3.1), DRAEM's textures, or lesions in HU."""

    kind: Literal["blobs", "perlin_texture", "lesions", "solid_lesions"] = "blobs"
    """Kind of pseudo anomaly. `blobs`: a constant grey shift in blobs of blurred noise (the thesis). `perlin_texture`:
    textures in Perlin masks (DRAEM); only `texture` applies. `lesions`: lesions in HU, painted into slices; only
    `lesions` applies. `solid_lesions`: sections of lesions in three dimensions, in HU; only `solid` applies."""
    texture: TextureSettings = TextureSettings()
    """Textures, for kind `perlin_texture`."""
    lesions: LesionSettings = LesionSettings()
    """Lesions in HU, for kind `lesions`."""
    solid: SolidLesionSettings = SolidLesionSettings()
    """Lesions in three dimensions, for kind `solid_lesions` and for the voxel classifier."""
    blur_sigma_px: Annotated[float, Field(gt=0)] = 15.0
    """Standard deviation of the Gaussian that blurs the noise, in pixels."""
    threshold_grey: Annotated[float, Field(gt=0, lt=255)] = 200.0
    """Grey value above which a pixel of the blurred noise is anomalous. The noise is stretched to 0..255 first. A lower
    value gives larger blobs."""
    ellipse_px: Annotated[int, Field(ge=1, le=63)] = 9
    """Side of the elliptical structuring element that smooths the blobs, in pixels. It must be odd."""
    shift_grey: tuple[float, float] = (60.0, 100.0)
    """Range of |C|, where C is the grey value added inside the mask. The sign of C is random."""
    shift_distribution: Literal["uniform", "normal"] = "uniform"
    """Distribution of C. `normal`: mean zero and a standard deviation of half the upper limit, truncated to the
    range."""

    @model_validator(mode="after")
    def _ranges(self) -> SynthesisSettings:
        if not 0 <= self.shift_grey[0] < self.shift_grey[1] <= 255:
            raise ValueError("shift_grey must be (low, high) with 0 <= low < high <= 255")
        if self.ellipse_px % 2 == 0:
            raise ValueError("ellipse_px must be odd")
        return self
