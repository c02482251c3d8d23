"""Settings of the systems that bring weights of their own: trained on auxiliary images, or segmentation models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medad.base.private import ModelFile
from medad.base.settings import Fraction, Settings
from zsad.config.run import NotNegative, Positive, PromptStyle
from zsad.config.system import VIT_L_BLOCKS, Blocks, SystemSettings, block_views
from zsad.config.views import PATCHES


class Training(Settings):
    """How a learned system is trained: Adam, over images with masks, in an order that the seed draws."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
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
    training: Training = Training(epochs=3, batch_size=16, learning_rate=1e-3)

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
    training: Training = Training(epochs=15, batch_size=8, learning_rate=1e-3)

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
