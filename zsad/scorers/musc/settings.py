"""Settings of MuSc and MuSc-2."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from zsad.config.system_base import VIT_L_BLOCKS, Blocks, SystemSettings, block_outputs


class MutualSettings(SystemSettings):
    """Settings shared by MuSc and MuSc-2: patches of several blocks are compared between images, without prompts."""

    align_corners: bool = True
    """Position of the patches when a map is enlarged. Published: the corner patches are at the corner pixels."""
    blocks: Blocks = VIT_L_BLOCKS
    """Blocks of the image tower that supply the patches, counted from 1."""
    degrees: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 3, 5)
    """Side lengths r of the neighbourhoods (r x r patches) over which patches are aggregated (LNAMD). Each is odd."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the other images, those with the smallest distances, over which a patch's score is averaged. At least
    one image is used."""

    top_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of an image's patches, those with the largest distances, over which its score is averaged. 0: the largest
    distance alone, as published."""
    subtract_median: bool = False
    """Subtraction of the median of an image's distances before its score is computed. It removes what all patches of an
    image have in common, such as another illumination. Not published."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of normal images with which each image is compared instead of other images, chosen by the seed from the
    category's training images. 0: none, as published."""
    cosines: Literal["fp32", "bf16"] = "fp32"
    """Number format of the products of patches. `bf16` is many times faster on processors with such instructions, and
    changes distances by less than 0.002."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return block_outputs(self.blocks)

    @model_validator(mode="after")
    def _degrees_are_odd(self) -> MutualSettings:
        if any(degree % 2 == 0 for degree in self.degrees):
            raise ValueError(f"degrees {list(self.degrees)}: each must be odd")
        return self


class MuSc(MutualSettings):
    """MuSc: every image is compared with all other images of its category."""

    title: ClassVar[str] = "MuSc"
    source: ClassVar[str] = "Li et al., MuSc (ICLR 2024)"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, blocks 6, 12, 18, 24, r 1, 3, 5, the whole test set"
    system: Literal["musc"] = "musc"
    """Name of the system."""
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = (1, 8, 9)
    """Numbers k of similar images over which an image's score is averaged (RsCIN). The image itself counts. Published:
    1, 8, 9 for VisA and 1, 2, 3 for MVTec AD. An empty list: no averaging. It is not used with `shots`."""
    partners: Annotated[int, Field(ge=2, le=4096)] | None = None
    """Largest number of other images with which an image is compared. In a larger set, each image is compared with its
    neighbours in a random circle. None: all others, as published."""

    @property
    def compares_images(self) -> bool:
        return not self.shots

    @property
    def reads_class_tokens(self) -> bool:
        return bool(self.neighbours) and not self.shots


class MuSc2(MutualSettings):
    """MuSc with one reference image per image, the baseline in table 1 of the dual-image paper."""

    title: ClassVar[str] = "MuSc-2"
    source: ClassVar[str] = "Zhang et al., Dual-Image Enhanced CLIP (2024), table 1: MuSc with two images"
    published: ClassVar[str] = "ViT-B-16-plus-240, blocks 3, 6, 9, 12, one random reference"
    system: Literal["musc_2"] = "musc_2"
    """Name of the system."""
    blocks: Blocks = (3, 6, 9, 12)
    """Blocks of the image tower that supply the patches, counted from 1."""
    references: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of reference images for each image, chosen at random by the seed."""

    @property
    def reference_count(self) -> int:
        return 0 if self.shots else self.references

    @property
    def reads_class_tokens(self) -> bool:
        return False
