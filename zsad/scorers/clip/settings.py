"""Settings of CLIP and CLIP-AC."""

from __future__ import annotations

from typing import ClassVar, Literal

from zsad.config.run import Positive, PromptStyle
from zsad.config.system_base import SystemSettings


class _PlainClip(SystemSettings):
    """Score from the class token, map from the patches of CLIP's original attention path."""

    tau: Positive = 0.01
    """Temperature of the softmax over normal and anomalous prompts."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("plain",)


class Clip(_PlainClip):
    """CLIP with one normal and one anomalous prompt."""

    title: ClassVar[str] = "CLIP"
    source: ClassVar[str] = "Radford et al., CLIP (2021); as a baseline in Zhou et al. (2024) and Zhang et al. (2024)"
    published: ClassVar[str] = (
        "ViT-B-16-plus-240 (Zhang et al.) or ViT-L-14-336 (Zhou et al.), one normal and one anomalous prompt"
    )
    system: Literal["clip"] = "clip"
    """Name of the system."""

    @property
    def prompts(self) -> PromptStyle:
        return "clip"


class ClipAc(_PlainClip):
    """CLIP with WinCLIP's ensemble of prompts."""

    title: ClassVar[str] = "CLIP-AC"
    source: ClassVar[str] = "Jeong et al., WinCLIP (CVPR 2023); as a baseline in Zhou et al., AnomalyCLIP (2024)"
    published: ClassVar[str] = "ViT-L-14-336 (Zhou et al.), WinCLIP's prompt ensemble"
    system: Literal["clip_ac"] = "clip_ac"
    """Name of the system."""

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"
