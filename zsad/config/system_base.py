"""What the settings of all systems have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from medad.base.settings import Settings
from zsad.config.run import PromptStyle

Blocks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
"""Blocks of the image tower by number from 1, as papers count."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,39}$")]

VIT_L_BLOCKS = (6, 12, 18, 24)


def block_outputs(blocks: tuple[int, ...]) -> tuple[str, ...]:
    """Names of these blocks' outputs."""
    return tuple(f"block-{number}" for number in blocks)


class SystemSettings(Settings):
    """What all systems have in common."""

    title: ClassVar[str]
    """Name in papers."""
    source: ClassVar[str]
    """Paper of the system."""
    published: ClassVar[str]
    """Setting of the published figures, in words."""
    encoder: str = "main"
    """Name of an encoder in `encoders`."""
    label: Label | None = None
    """Name in tables; defaults to the title. Needed for a system that stands twice."""

    @property
    def display_name(self) -> str:
        return self.label or self.title

    @property
    def outputs(self) -> tuple[str, ...]:
        """Views of `zsad.config.encoder_outputs` that it reads beside class tokens; no others are made for it."""
        return ()

    @property
    def prompts(self) -> PromptStyle | None:
        """Of the text features that it reads. None: it reads none, or makes its own."""
        return None

    @property
    def reference_count(self) -> int:
        """Other images of the category that are drawn for each query by the seed."""
        return 0

    @property
    def seeded(self) -> bool:
        """Whether its scores depend on the seed."""
        return self.reference_count > 0

    @property
    def trained(self) -> bool:
        """Whether it is trained on auxiliary data, with labels and masks, first."""
        return False

    @property
    def loads_encoder(self) -> bool:
        """Whether scoring loads the encoder itself, beside its features: for prompts or images of its own."""
        return False
