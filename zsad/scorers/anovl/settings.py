"""Settings of AnoCLIP (AnoVL)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import NotNegative, Positive, PromptStyle
from zsad.config.system_base import SystemSettings


class AnoVl(SystemSettings):
    """AnoCLIP (AnoVL): patches of the V-V path and domain-aware prompts, with its own test-time adaptation."""

    title: ClassVar[str] = "AnoCLIP"
    source: ClassVar[str] = "Deng et al., AnoVL (2023)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px; AdamW 1e-3, 5 steps, token noise 0.055"
    system: Literal["anovl"] = "anovl"
    """Name of the system."""
    align_corners: bool = True
    """Position of the patches when a map is enlarged. Published: the corner patches are at the corner pixels."""
    tau: Positive = 1.0
    """Temperature of the softmax over normal and anomalous prompts."""
    steps: Annotated[int, Field(ge=0, le=1000)] = 5
    """Number of adaptation steps for each image. 0: no adaptation."""
    learning_rate: Positive = 1e-3
    """Learning rate of the optimiser AdamW."""
    noise: NotNegative = 0.055
    """Standard deviation of the Gaussian noise that adaptation adds to the tokens."""
    mean_patches: Annotated[int, Field(ge=1)] = 3
    """Side of the square of patches over which each map value is averaged; odd. Values at the edge are repeated beyond
    it. 1: no averaging."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return (PATCHES,)

    @property
    def prompts(self) -> PromptStyle:
        return "anovl"

    @field_validator("mean_patches")
    @classmethod
    def _mean_is_centred(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value

    @property
    def seeded(self) -> bool:
        return self.steps > 0
