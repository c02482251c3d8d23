"""Settings of APRIL-GAN."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from medad.base.settings import Fraction
from zsad.config.run import Positive, PromptStyle
from zsad.config.system_base import VIT_L_BLOCKS, Blocks, LearnedSettings, Training, block_outputs


class AprilGan(LearnedSettings):
    """APRIL-GAN (VAND challenge): one trained linear layer per block maps patches to the space of the prompts."""

    title: ClassVar[str] = "APRIL-GAN"
    source: ClassVar[str] = "Chen et al., APRIL-GAN (VAND challenge 2023)"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, blocks 6, 12, 18, 24; trained on the other data set"
    system: Literal["april_gan"] = "april_gan"
    """Name of the system."""
    align_corners: bool = True
    """Position of the patches when a map is enlarged. Published: the corner patches are at the corner pixels.
    The training uses it, too."""
    blocks: Blocks = VIT_L_BLOCKS
    """Blocks of the image tower with a linear layer each, counted from 1."""
    scale: Positive = 100.0
    """Factor on the cosines before the softmax, for the class token and the patches."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of normal images in the memory, chosen by the seed from the category's training images. 0: zero-shot.
    Published: 0, 1 and 4."""
    map_share: Fraction | None = None
    """Weight of the map's maximum in the image's score. The rest is the weight of the class token. None: as published,
    0 for zero-shot and 0.5 for few-shot."""
    stretch_map: bool = False
    """Stretching of the map's maximum to 0..1 over all images of the category, before it enters the image's score. So
    the few-shot figures were published. Without it no score depends on other images."""
    fixed_by_training: ClassVar[tuple[str, ...]] = ("blocks",)
    """Names of the settings that must equal those of the training."""
    training: Training = Training(epochs=3, batch_size=16, learning_rate=1e-3)
    """Training, used without a `checkpoint`. Published: 3 epochs on MVTec AD and 15 on VisA."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return block_outputs(self.blocks)

    @property
    def compares_images(self) -> bool:
        return self.stretch_map

    @property
    def weight_of_map(self) -> float:
        """Weight of the map's maximum in the image's score."""
        return self.map_share if self.map_share is not None else 0.5 * (self.shots > 0)

    @property
    def prompts(self) -> PromptStyle:
        return "april_gan"
