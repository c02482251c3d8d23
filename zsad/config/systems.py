"""The systems of the papers as settings: one class each, whose defaults are the published setting (its preset).

Nothing here computes or loads torch. `System` is what stands in a configuration's list `systems`; what a system needs
(views of the encoder, prompts, reference images, training) is told by its properties, so that the flow can prepare it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medad.base.private import ModelFile
from medad.base.settings import Fraction, Settings
from zsad.config.run import AdaptSettings, NotNegative, Positive, PromptStyle, ReferenceSettings, ScoreSettings
from zsad.config.views import PATCHES

Blocks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
"""Blocks of the image tower by number from 1, as papers count."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,39}$")]

VIT_L_BLOCKS = (6, 12, 18, 24)


def block_views(blocks: tuple[int, ...]) -> tuple[str, ...]:
    """Names of these blocks' views."""
    return tuple(f"block-{number}" for number in blocks)


class SystemSettings(Settings):
    """What all systems have in common."""

    title: ClassVar[str]
    """As papers call it."""
    source: ClassVar[str]
    published: ClassVar[str]
    """The setting of the published figures, in words."""
    encoder: str = "main"
    """A name of the configuration's `encoders`."""
    label: Label | None = None
    """How tables call it. None: the system's title. Needed where a system stands twice."""

    @property
    def shown(self) -> str:
        return self.label or self.title

    @property
    def views(self) -> tuple[str, ...]:
        """Views of `zsad.config.views` that it reads beside class tokens; no others are made for it."""
        return ()

    @property
    def prompts(self) -> PromptStyle | None:
        """Of the text features that it reads. None: it reads none, or makes its own."""
        return None

    @property
    def drawn(self) -> int:
        """Other images of the category that are drawn for each query by the seed."""
        return 0

    @property
    def seeded(self) -> bool:
        """Whether its scores depend on the seed."""
        return self.drawn > 0

    @property
    def trained(self) -> bool:
        """Whether it is trained on auxiliary data, with labels and masks, first."""
        return False

    @property
    def loads_encoder(self) -> bool:
        """Whether scoring loads the encoder itself, beside its features: for prompts or images of its own."""
        return False


class _PlainClip(SystemSettings):
    """The class token for the image, the original path's patches for the map."""

    tau: Positive = 0.01

    @property
    def views(self) -> tuple[str, ...]:
        return ("plain",)


class Clip(_PlainClip):
    """CLIP with one plain prompt a side."""

    title: ClassVar[str] = "CLIP"
    source: ClassVar[str] = "Radford et al., CLIP; as a baseline in 001 and 002"
    published: ClassVar[str] = "ViT-B-16-plus-240 (002) or ViT-L-14-336 (001), one plain prompt a side"
    system: Literal["clip"] = "clip"

    @property
    def prompts(self) -> PromptStyle:
        return "clip"


class ClipAc(_PlainClip):
    """CLIP with the anomaly prompt ensemble of WinCLIP."""

    title: ClassVar[str] = "CLIP-AC"
    source: ClassVar[str] = "Jeong et al., WinCLIP; as a baseline in 001"
    published: ClassVar[str] = "ViT-L-14-336 (001), WinCLIP's prompt ensemble"
    system: Literal["clip_ac"] = "clip_ac"

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"


class WinClip(SystemSettings):
    """WinCLIP: windows of patches encoded for themselves, harmonic means; with `shots`, a memory of normal images."""

    title: ClassVar[str] = "WinCLIP"
    source: ClassVar[str] = "Jeong et al., WinCLIP (CVPR 2023)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px, tau 0.07, windows of 2 and 3 patches"
    system: Literal["winclip"] = "winclip"
    tau: Positive = 0.07
    windows: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 3)
    """Sides, in patches."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Normal images of the category's training folder, drawn by the seed. 0: zero-shot."""

    @property
    def views(self) -> tuple[str, ...]:
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
    tau: Positive = 1.0
    steps: Annotated[int, Field(ge=0, le=1000)] = 5
    """Of adaptation. 0: none."""
    learning_rate: Positive = 1e-3
    noise: NotNegative = 0.055
    """Standard deviation of the Gaussian noise on tokens."""

    @property
    def views(self) -> tuple[str, ...]:
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
    degrees: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 3, 5)
    """r of LNAMD: neighbourhoods of r x r patches, odd."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Of the smallest distances to other images that are averaged; one at least."""

    @property
    def views(self) -> tuple[str, ...]:
        return block_views(self.blocks)

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
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 3)
    """k of RsCIN, the image itself counted: MVTec AD 1, 2, 3; VisA 1, 8, 9. Empty: no re-scoring."""


class MuSc2(MutualSettings):
    """MuSc with one reference image a query, as 002 compares itself with it."""

    title: ClassVar[str] = "MuSc-2"
    source: ClassVar[str] = "002, table 1: MuSc with two images"
    published: ClassVar[str] = "ViT-B-16-plus-240, blocks 3, 6, 9, 12, one random reference"
    system: Literal["musc_2"] = "musc_2"
    blocks: Blocks = (3, 6, 9, 12)
    references: Annotated[int, Field(ge=1, le=64)] = 1

    @property
    def drawn(self) -> int:
        return self.references


class DualImage(SystemSettings):
    """Dual-image enhanced CLIP (002), with test-time adaptation or without."""

    title: ClassVar[str] = "Dual-image"
    source: ClassVar[str] = "002"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px; one random reference; 6 seeds"
    system: Literal["dual"] = "dual"
    adaptation: bool = False
    """Whether to adapt (eq. 7-13)."""
    tau: Positive = 1.0
    lambda_1: NotNegative = 1.0
    lambda_2: NotNegative = 1.5
    lambda_3: NotNegative = 1.0
    lambda_4: NotNegative = 1.0
    lambda_5: NotNegative = 1.0
    references: ReferenceSettings = ReferenceSettings()
    adapt: AdaptSettings = AdaptSettings()

    @property
    def shown(self) -> str:
        return self.label or (f"{self.title} + TTA" if self.adaptation else self.title)

    @property
    def views(self) -> tuple[str, ...]:
        return (PATCHES,)

    @property
    def prompts(self) -> PromptStyle:
        return "supplement"

    @property
    def drawn(self) -> int:
        return self.references.count

    @property
    def seeded(self) -> bool:
        return self.drawn > 0 or self.adaptation

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


class Training(Settings):
    """How a learned system is trained: Adam, over images with masks, in an order that the seed draws."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    seed: Annotated[int, Field(ge=0)] = 0


class LearnedSettings(SystemSettings):
    """A system that is trained on auxiliary data, encoder frozen, and used on others."""

    checkpoint: ModelFile | None = None
    """A file of `adflows zsad train`. None: trained by the run itself, for each category on the others."""
    fitted: ClassVar[tuple[str, ...]]
    """Settings that trained weights belong to: a checkpoint of other values is refused."""

    @property
    def trained(self) -> bool:
        return True


class AprilGan(LearnedSettings):
    """APRIL-GAN (VAND): a linear layer for each of four blocks' patches."""

    title: ClassVar[str] = "APRIL-GAN"
    source: ClassVar[str] = "Chen et al., APRIL-GAN (VAND challenge 2023)"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, blocks 6, 12, 18, 24; trained on the other data set"
    system: Literal["april_gan"] = "april_gan"
    blocks: Blocks = VIT_L_BLOCKS
    scale: Positive = 100.0
    """Of cosines before the softmax, image and patches alike."""
    map_share: Fraction = 0.0
    """Of the map's maximum in the image's score, beside the class token. Published: none without shots, half with."""
    fitted: ClassVar[tuple[str, ...]] = ("blocks",)
    training: Training = Training(epochs=3, batch_size=16, learning_rate=1e-3, betas=(0.5, 0.999))

    @property
    def views(self) -> tuple[str, ...]:
        return block_views(self.blocks)

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"


class AnomalyClip(LearnedSettings):
    """AnomalyCLIP (001): two learned prompts, deep tokens in the text tower, DPAM patches."""

    title: ClassVar[str] = "AnomalyCLIP"
    source: ClassVar[str] = "001"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, encoder preset anomalyclip; trained on the other data set"
    system: Literal["anomalyclip"] = "anomalyclip"
    prompt: Literal["object_agnostic", "object_aware"] = "object_agnostic"
    context_tokens: Annotated[int, Field(ge=1)] = 12
    """E: learned words a side (figure of the prompt length)."""
    full_stop: bool = False
    """Whether the prompts end in one. The paper prints none; the public checkpoints were trained with one."""
    deep_tokens: Annotated[int, Field(ge=0)] = 4
    """Q of eq. 3: learned tokens a layer, at most E. 0: no refinement of the textual space."""
    depth: Annotated[int, Field(ge=1)] = 9
    """M': layers of the text tower up to which deep tokens are put in; the first has the prompt itself."""
    tau: Positive = 0.07
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Blocks whose V-V path patches are segmented too. Empty: the last alone, as published."""
    lambda_local: NotNegative = 4.0
    """lambda of eq. 2."""
    losses: Annotated[tuple[Literal["global", "local"], ...], Field(min_length=1)] = ("global", "local")
    sigma_px: NotNegative = 4.0
    """Of the Gaussian G_sigma over the map."""
    fitted: ClassVar[tuple[str, ...]] = ("prompt", "context_tokens", "full_stop", "deep_tokens", "depth")
    training: Training = Training(epochs=15, batch_size=8, learning_rate=1e-3, betas=(0.5, 0.999))

    @property
    def loads_encoder(self) -> bool:
        return True

    @property
    def views(self) -> tuple[str, ...]:
        """The set M of eq. 2."""
        return tuple(f"vv-{number}" for number in self.blocks) or (PATCHES,)

    @model_validator(mode="after")
    def _deep_tokens_fit(self) -> AnomalyClip:
        # Q < P of section 3.3, where the shorter prompt has the E words and the object's
        if self.deep_tokens > self.context_tokens:
            raise ValueError(
                f"deep_tokens {self.deep_tokens} replace more than the {self.context_tokens} learned words"
            )
        return self


class SegmentationModels(SystemSettings):
    """003: foreground by SAM and a salient-object model, tiles, CLIP by tile, CLIPSeg by pixel."""

    title: ClassVar[str] = "Segmentation models"
    source: ClassVar[str] = "003"
    published: ClassVar[str] = "CLIP, CLIPSeg, SAM and a dichotomous segmentation model; VisA"
    system: Literal["segmentation"] = "segmentation"
    clipseg: ModelFile | None = None
    """Folder of a CLIPSeg model (transformers' files)."""
    sam: ModelFile | None = None
    """Folder of a SAM model (transformers' files)."""
    sam_points_per_side: Annotated[int, Field(ge=1, le=256)] = 32
    """Of the grid of points that SAM is asked at; this and the next three are SAM's own."""
    sam_min_iou: NotNegative = 0.88
    """Masks of a lower predicted IoU are dropped. 0: none."""
    sam_min_stability: NotNegative = 0.95
    """Masks that change more with their threshold are dropped. 0: none."""
    sam_max_box_iou: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Of two masks whose boxes overlap more, one is dropped."""
    salient: ModelFile | None = None
    """TorchScript file of a salient-object (dichotomous) model: image 0..1 -> one channel."""
    salient_px: Annotated[int, Field(ge=32, le=4096)] = 1024
    """Side of the square that it sees."""
    salient_output: Literal["probability", "logits"] = "probability"
    """What its channel holds."""
    salient_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability from which on a pixel stands out."""
    foreground_px: Annotated[int, Field(ge=32, le=8192)] = 1024
    """A larger image has its longer side reduced to this to find the foreground: SAM's input."""
    covered: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of a SAM segment inside the dichotomous mask for it to be foreground."""
    tile_px: Annotated[int, Field(ge=16, le=4096)] = 352
    """Smallest side of a tile: CLIPSeg's input."""
    long_aspect: Annotated[float, Field(gt=1)] = 1.5
    many_parts: Annotated[int, Field(ge=1)] = 20
    """A component longer than `long_aspect` and of more SAM segments than this is tiled along its length."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of the foreground components, whose mean is the image's score."""
    tau: Positive = 0.07

    @property
    def loads_encoder(self) -> bool:
        return True

    @property
    def prompts(self) -> None:
        return None


System = Annotated[
    Clip | ClipAc | WinClip | AnoVl | MuSc | MuSc2 | DualImage | AprilGan | AnomalyClip | SegmentationModels,
    Field(discriminator="system"),
]
"""One system with its settings, told apart by `system`."""
