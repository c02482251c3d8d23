"""The systems of the papers as settings: one class each, whose defaults are the published setting (its preset).

Nothing here computes or loads torch. `System` is what stands in a configuration's list `systems`; what a system needs
(encoder outputs, prompts, reference images, training) is told by its properties, so that the flow can prepare it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from zsad.config.encoder_outputs import PATCHES
from zsad.config.learned import AnomalyClip, AprilGan, SegmentationModels
from zsad.config.run import AdaptSettings, NotNegative, Positive, PromptStyle, ReferenceSettings, ScoreSettings
from zsad.config.system_base import VIT_L_BLOCKS, Blocks, SystemSettings, block_outputs


class _PlainClip(SystemSettings):
    """The class token for the image, the original path's patches for the map."""

    tau: Positive = 0.01
    """Temperature of the softmax over normal and anomalous."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("plain",)


class Clip(_PlainClip):
    """CLIP with one plain prompt a side."""

    title: ClassVar[str] = "CLIP"
    source: ClassVar[str] = "Radford et al., CLIP; as a baseline in 001 and 002"
    published: ClassVar[str] = "ViT-B-16-plus-240 (002) or ViT-L-14-336 (001), one plain prompt a side"
    system: Literal["clip"] = "clip"
    """Name of the system."""

    @property
    def prompts(self) -> PromptStyle:
        return "clip"


class ClipAc(_PlainClip):
    """CLIP with the anomaly prompt ensemble of WinCLIP."""

    title: ClassVar[str] = "CLIP-AC"
    source: ClassVar[str] = "Jeong et al., WinCLIP; as a baseline in 001"
    published: ClassVar[str] = "ViT-L-14-336 (001), WinCLIP's prompt ensemble"
    system: Literal["clip_ac"] = "clip_ac"
    """Name of the system."""

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"


class WinClip(SystemSettings):
    """WinCLIP: windows of patches encoded for themselves, harmonic means; with `shots`, a memory of normal images."""

    title: ClassVar[str] = "WinCLIP"
    source: ClassVar[str] = "Jeong et al., WinCLIP (CVPR 2023)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px, tau 0.07, windows of 2 and 3 patches"
    system: Literal["winclip"] = "winclip"
    """Name of the system."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous."""
    windows: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 3)
    """Sides of the windows, in patches."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of normal images, chosen by the seed from the category's training folder. 0: zero-shot."""

    @property
    def outputs(self) -> tuple[str, ...]:
        windows = tuple(f"window-{side}" for side in self.windows)
        return (*windows, "tokens") if self.shots else windows

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"

    @property
    def seeded(self) -> bool:
        return self.shots > 0


class AnoVl(SystemSettings):
    """AnoCLIP / AnoVL: V-V patches against the domain-aware ensemble; its own test-time adaptation."""

    title: ClassVar[str] = "AnoCLIP"
    source: ClassVar[str] = "Deng et al., AnoVL (2023)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px; AdamW 1e-3, 5 steps, token noise 0.055"
    system: Literal["anovl"] = "anovl"
    """Name of the system."""
    tau: Positive = 1.0
    """Temperature of the softmax over normal and anomalous."""
    steps: Annotated[int, Field(ge=0, le=1000)] = 5
    """Steps of adaptation. 0: none."""
    learning_rate: Positive = 1e-3
    """Learning rate of AdamW."""
    noise: NotNegative = 0.055
    """Standard deviation of the Gaussian noise on tokens."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return (PATCHES,)

    @property
    def prompts(self) -> PromptStyle:
        return "supplement"

    @property
    def seeded(self) -> bool:
        return self.steps > 0


class MutualSettings(SystemSettings):
    """Patches of several blocks, LNAMD and mutual scoring; no text."""

    blocks: Blocks = VIT_L_BLOCKS
    """Blocks whose patches are compared, from 1."""
    degrees: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 3, 5)
    """Sides r of LNAMD's neighbourhoods of r x r patches; odd."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the smallest distances to other images that is averaged; at least one distance."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return block_outputs(self.blocks)

    @model_validator(mode="after")
    def _degrees_are_odd(self) -> MutualSettings:
        if any(degree % 2 == 0 for degree in self.degrees):
            raise ValueError(f"degrees {list(self.degrees)}: a neighbourhood has a middle, so an odd side")
        return self


class MuSc(MutualSettings):
    """MuSc: every image of the category scored by all others."""

    title: ClassVar[str] = "MuSc"
    source: ClassVar[str] = "Li et al., MuSc (ICLR 2024)"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, blocks 6, 12, 18, 24, r 1, 3, 5, the whole test set"
    system: Literal["musc"] = "musc"
    """Name of the system."""
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 3)
    """Numbers k of neighbours in RsCIN, the image itself counted. MVTec AD: 1, 2, 3. VisA: 1, 8, 9. Empty: no
    re-scoring."""


class MuSc2(MutualSettings):
    """MuSc with one reference image a query, as 002 compares itself with it."""

    title: ClassVar[str] = "MuSc-2"
    source: ClassVar[str] = "002, table 1: MuSc with two images"
    published: ClassVar[str] = "ViT-B-16-plus-240, blocks 3, 6, 9, 12, one random reference"
    system: Literal["musc_2"] = "musc_2"
    """Name of the system."""
    blocks: Blocks = (3, 6, 9, 12)
    """Blocks whose patches are compared, from 1."""
    references: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of reference images per query."""

    @property
    def reference_count(self) -> int:
        return self.references


class DualImage(SystemSettings):
    """Dual-image enhanced CLIP (002), with test-time adaptation or without."""

    title: ClassVar[str] = "Dual-image"
    source: ClassVar[str] = "002"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px; one random reference; 6 seeds"
    system: Literal["dual"] = "dual"
    """Name of the system."""
    adaptation: bool = False
    """Test-time adaptation (eq. 7-13)."""
    tau: Positive = 1.0
    """Temperature of eq. 1-3."""
    lambda_1: NotNegative = 1.0
    """Weight of A_V in the map (eq. 12)."""
    lambda_2: NotNegative = 1.5
    """Weight of A_T in the map (eq. 12)."""
    lambda_3: NotNegative = 1.0
    """Weight of the class token's score (eq. 13)."""
    lambda_4: NotNegative = 1.0
    """Weight of max A_V in the image's score (eq. 13)."""
    lambda_5: NotNegative = 1.0
    """Weight of max A_T in the image's score (eq. 13)."""
    references: ReferenceSettings = ReferenceSettings()
    """Reference images."""
    adapt: AdaptSettings = AdaptSettings()
    """Settings of the adaptation."""

    @property
    def display_name(self) -> str:
        return self.label or (f"{self.title} + TTA" if self.adaptation else self.title)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (PATCHES,)

    @property
    def prompts(self) -> PromptStyle:
        return "supplement"

    @property
    def reference_count(self) -> int:
        return self.references.count

    @property
    def seeded(self) -> bool:
        return self.reference_count > 0 or self.adaptation

    @property
    def variant(self) -> Literal["text", "text_tta", "joint", "joint_tta"]:
        if not self.references.count:
            return "text_tta" if self.adaptation else "text"
        return "joint_tta" if self.adaptation else "joint"

    @property
    def score(self) -> ScoreSettings:
        """The same for `zsad.steps.score_dual`."""
        names = ("tau", "lambda_1", "lambda_2", "lambda_3", "lambda_4", "lambda_5", "references")
        return ScoreSettings(variants=(self.variant,), **{name: getattr(self, name) for name in names})


System = Annotated[
    Clip | ClipAc | WinClip | AnoVl | MuSc | MuSc2 | DualImage | AprilGan | AnomalyClip | SegmentationModels,
    Field(discriminator="system"),
]
"""One system with its settings, told apart by `system`."""
