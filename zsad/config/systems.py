"""Settings of the systems that need no training, and the union `System` of all systems.

Each system has one class, and its defaults are the published values. `System` is the type of an entry of the list
`systems` in a configuration. The properties of a class say what the flow must prepare: encoder outputs, prompts,
reference images, training. The base class is in `zsad.config.system_base`. Systems with additional weights are in
`zsad.config.learned`. Nothing here computes anything or loads torch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from zsad.config.encoder_outputs import PATCHES
from zsad.config.learned import AnomalyClip, AprilGan, SegmentationModels
from zsad.config.run import (
    WITH_ADAPTATION,
    WITH_REFERENCES,
    AdaptSettings,
    NotNegative,
    Positive,
    PromptStyle,
    ReferenceSettings,
    ScoreSettings,
    Variant,
)
from zsad.config.system_base import VIT_L_BLOCKS, Blocks, SystemSettings, block_outputs


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
    """AnoCLIP (AnoVL): patches of the V-V path and domain-aware prompts, with its own test-time adaptation."""

    title: ClassVar[str] = "AnoCLIP"
    source: ClassVar[str] = "Deng et al., AnoVL (2023)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px; AdamW 1e-3, 5 steps, token noise 0.055"
    system: Literal["anovl"] = "anovl"
    """Name of the system."""
    tau: Positive = 1.0
    """Temperature of the softmax over normal and anomalous prompts."""
    steps: Annotated[int, Field(ge=0, le=1000)] = 5
    """Number of adaptation steps for each image. 0: no adaptation."""
    learning_rate: Positive = 1e-3
    """Learning rate of the optimiser AdamW."""
    noise: NotNegative = 0.055
    """Standard deviation of the Gaussian noise that adaptation adds to the tokens."""

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
    """Settings shared by MuSc and MuSc-2: patches of several blocks are compared between images, without prompts."""

    blocks: Blocks = VIT_L_BLOCKS
    """Blocks of the image tower that supply the patches, counted from 1."""
    degrees: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 3, 5)
    """Side lengths r of the neighbourhoods (r x r patches) over which patches are aggregated (LNAMD). Each is odd."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the other images, those with the smallest distances, over which a patch's score is averaged. At least
    one image is used."""

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
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 3)
    """Numbers k of similar images over which an image's score is averaged (RsCIN). The image itself counts. Published:
    1, 2, 3 for MVTec AD and 1, 8, 9 for VisA. An empty list: no averaging."""

    @property
    def compares_images(self) -> bool:
        return True


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
        return self.references


class DualImage(SystemSettings):
    """Dual-image enhanced CLIP (Zhang et al., 2024): prompts and reference images.

    Test-time adaptation is optional. Equation numbers are those of the paper, Dual-Image Enhanced CLIP.
    A_V is the map of distances to the reference images. A_T is the map of the prompts after test-time adaptation.
    """

    title: ClassVar[str] = "Dual-image"
    source: ClassVar[str] = "Zhang et al., Dual-Image Enhanced CLIP (2024)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px; one random reference; 6 seeds"
    system: Literal["dual"] = "dual"
    """Name of the system."""
    adaptation: bool = False
    """Use of test-time adaptation (eq. 7-13)."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] | None = None
    """Variants to score, by the evidence used. `text`: prompts. `visual`: reference images. `joint`: both. `text_tta`
    and `joint_tta`: the same with test-time adaptation. Reports show the maps of the last one. None: `joint` or
    `joint_tta`, by `adaptation`; without reference images `text` or `text_tta`."""
    tau: Positive = 1.0
    """Temperature of the softmax over normal and anomalous prompts (eq. 1-3)."""
    lambda_1: NotNegative = 1.0
    """Weight of A_V in the map (eq. 12)."""
    lambda_2: NotNegative = 1.5
    """Weight of A_T in the map (eq. 12). It is not used without adaptation."""
    lambda_3: NotNegative = 1.0
    """Weight of the class token's score in the image's score (eq. 13)."""
    lambda_4: NotNegative = 1.0
    """Weight of the maximum of A_V in the image's score (eq. 13)."""
    lambda_5: NotNegative = 1.0
    """Weight of the maximum of A_T in the image's score (eq. 13). Without adaptation: of the prompts' map."""
    lambda_text: NotNegative = 1.0
    """Weight of the prompts' map in the map of variant `joint`. Eq. 6 has 1."""
    references: ReferenceSettings = ReferenceSettings()
    """Reference images."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of normal images that are the references of every image instead, chosen by the seed from the category's
    training images. 0: none."""
    adapt: AdaptSettings = AdaptSettings()
    """Test-time adaptation."""

    @model_validator(mode="after")
    def _variants_can_be_scored(self) -> DualImage:
        _ = self.score
        return self

    @property
    def display_name(self) -> str:
        return self.label or (f"{self.title} + TTA" if self.adaptation else self.title)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (PATCHES,)

    @property
    def prompts(self) -> PromptStyle | None:
        return None if set(self.variant_names) == {"visual"} else "supplement"

    @property
    def reference_count(self) -> int:
        return self.references.count

    @property
    def seeded(self) -> bool:
        used = set(self.variant_names)
        return not used.isdisjoint(WITH_REFERENCES | WITH_ADAPTATION)

    @property
    def compares_images(self) -> bool:
        return not set(self.variant_names).isdisjoint(WITH_REFERENCES)

    @property
    def loads_encoder(self) -> bool:
        return not set(self.variant_names).isdisjoint(WITH_ADAPTATION)

    @property
    def variant_names(self) -> tuple[Variant, ...]:
        if self.variants is not None:
            return self.variants
        if not self.references.count:
            return ("text_tta" if self.adaptation else "text",)
        return ("joint_tta" if self.adaptation else "joint",)

    @property
    def score(self) -> ScoreSettings:
        """These settings in the form that `zsad.steps.score_dual` takes."""
        names = ("tau", "lambda_1", "lambda_2", "lambda_3", "lambda_4", "lambda_5", "lambda_text", "references")
        return ScoreSettings(variants=self.variant_names, **{name: getattr(self, name) for name in names})

    def without_references(self) -> DualImage:
        """Return the settings for a category with a single image: each variant uses only the prompts."""
        return self.model_copy(update={"variants": self.score.without_references().variants})


System = Annotated[
    Clip | ClipAc | WinClip | AnoVl | MuSc | MuSc2 | DualImage | AprilGan | AnomalyClip | SegmentationModels,
    Field(discriminator="system"),
]
"""Settings of one system. The field `system` says which one."""
