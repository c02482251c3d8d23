"""Settings of WinCLIP."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from zsad.config.run import Positive, PromptStyle
from zsad.config.system_base import SystemSettings


class WinClip(SystemSettings):
    """WinCLIP: each window of patches is encoded separately, and the scores of windows are joined by harmonic means.

    With `shots`, images are also compared with a memory of normal images.
    """

    title: ClassVar[str] = "WinCLIP"
    source: ClassVar[str] = "Jeong et al., WinCLIP (CVPR 2023)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px, tau 0.07, windows of 2 and 3 patches"
    system: Literal["winclip"] = "winclip"
    """Name of the system."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous prompts."""
    windows: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 3)
    """Side lengths of the square windows, in patches."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of normal images in the memory, chosen by the seed from the category's training images. 0: zero-shot."""

    memory_ln_post: bool = False
    """Normalisation of the memory's patches by the last LayerNorm (ln_post) of the image tower. Public implementations
    compare the patches before it."""

    @property
    def outputs(self) -> tuple[str, ...]:
        windows = tuple(f"window-{side}" for side in self.windows)
        return (*windows, self.patch_output) if self.shots else windows

    @property
    def patch_output(self) -> str:
        """Name of the encoder output whose patches are compared with the memory."""
        return "tokens" if self.memory_ln_post else "raw"

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"
