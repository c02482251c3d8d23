"""Settings of the systems that bring weights of their own: trained on auxiliary images, or segmentation models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medad.base.private import ModelFile
from medad.base.settings import Fraction, Settings
from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import NotNegative, Positive, PromptStyle
from zsad.config.system_base import VIT_L_BLOCKS, Blocks, SystemSettings, block_outputs


class Training(Settings):
    """How a learned system is trained: Adam, over images with masks, in an order that the seed draws."""

    epochs: Annotated[int, Field(ge=1)]
    """Epochs of training."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images per batch."""
    learning_rate: Positive
    """Learning rate of Adam."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the images' order."""


class LearnedSettings(SystemSettings):
    """A system that is trained on auxiliary data, encoder frozen, and used on others."""

    checkpoint: ModelFile | None = None
    """File of `adflows zsad train`. None: the run trains the system, on `auxiliary` or on the other categories."""
    fixed_by_training: ClassVar[tuple[str, ...]]
    """Settings that trained weights belong to. A checkpoint of other values is refused."""

    @property
    def trained(self) -> bool:
        return True


class AprilGan(LearnedSettings):
    """APRIL-GAN (VAND): a linear layer for each of four blocks' patches."""

    title: ClassVar[str] = "APRIL-GAN"
    source: ClassVar[str] = "Chen et al., APRIL-GAN (VAND challenge 2023)"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, blocks 6, 12, 18, 24; trained on the other data set"
    system: Literal["april_gan"] = "april_gan"
    """Name of the system."""
    blocks: Blocks = VIT_L_BLOCKS
    """Blocks with a linear layer each, from 1."""
    scale: Positive = 100.0
    """Factor on cosines before the softmax, for image and patches alike."""
    map_share: Fraction = 0.0
    """Weight of the map's maximum in the image's score, beside the class token. Published: 0 without shots, 0.5
    with."""
    fixed_by_training: ClassVar[tuple[str, ...]] = ("blocks",)
    """Settings that trained weights belong to."""
    training: Training = Training(epochs=3, batch_size=16, learning_rate=1e-3)
    """Training of the system."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return block_outputs(self.blocks)

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"


class AnomalyClip(LearnedSettings):
    """AnomalyCLIP (001): two learned prompts, deep tokens in the text tower, DPAM patches."""

    title: ClassVar[str] = "AnomalyCLIP"
    source: ClassVar[str] = "001"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, encoder preset anomalyclip; trained on the other data set"
    system: Literal["anomalyclip"] = "anomalyclip"
    """Name of the system."""
    prompt: Literal["object_agnostic", "object_aware"] = "object_agnostic"
    """Prompts with or without the object's name."""
    context_tokens: Annotated[int, Field(ge=1)] = 12
    """Number E of learned words per side."""
    full_stop: bool = False
    """Full stop at the end of the prompts. The paper prints none; the public checkpoints were trained with one."""
    deep_tokens: Annotated[int, Field(ge=0)] = 4
    """Number Q of learned tokens per layer (eq. 3), at most E. 0: no refinement of the textual space."""
    depth: Annotated[int, Field(ge=1)] = 9
    """Number M' of the text tower's layers with deep tokens. The first has the prompt itself."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous."""
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Blocks whose V-V patches are segmented too. Empty: the last alone, as published."""
    lambda_local: NotNegative = 4.0
    """Weight lambda of the local loss (eq. 2)."""
    losses: Annotated[tuple[Literal["global", "local"], ...], Field(min_length=1)] = ("global", "local")
    """Losses of the training."""
    sigma_px: NotNegative = 4.0
    """Standard deviation of the Gaussian over the map."""
    fixed_by_training: ClassVar[tuple[str, ...]] = ("prompt", "context_tokens", "full_stop", "deep_tokens", "depth")
    """Settings that trained weights belong to."""
    training: Training = Training(epochs=15, batch_size=8, learning_rate=1e-3)
    """Training of the system."""

    @property
    def loads_encoder(self) -> bool:
        return True

    @property
    def outputs(self) -> tuple[str, ...]:
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
    """Name of the system."""
    clipseg: ModelFile | None = None
    """Folder of a CLIPSeg model (transformers' files)."""
    sam: ModelFile | None = None
    """Folder of a SAM model (transformers' files)."""
    sam_points_per_side: Annotated[int, Field(ge=1, le=256)] = 32
    """Side of the grid of points at which SAM is asked. The default is SAM's own."""
    sam_min_iou: NotNegative = 0.88
    """Smallest predicted IoU of a mask. The default is SAM's own; 0: all masks stay."""
    sam_min_stability: NotNegative = 0.95
    """Smallest stability of a mask against its threshold. The default is SAM's own; 0: all masks stay."""
    sam_max_box_iou: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Largest IoU of two masks' boxes; beyond it one mask is dropped. The default is SAM's own."""
    salient: ModelFile | None = None
    """TorchScript file of a salient-object (dichotomous) model: image 0..1 to one channel."""
    salient_px: Annotated[int, Field(ge=32, le=4096)] = 1024
    """Side of the square that the salient-object model sees."""
    salient_output: Literal["probability", "logits"] = "probability"
    """Content of that model's channel."""
    foreground_px: Annotated[int, Field(ge=32, le=8192)] = 1024
    """Longest side of the image in which the foreground is found. The default is SAM's input."""
    covered: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of a SAM segment inside the salient object from which the segment is foreground."""
    tile_px: Annotated[int, Field(ge=16, le=4096)] = 352
    """Smallest side of a tile. The default is CLIPSeg's input."""
    long_aspect: Annotated[float, Field(gt=1)] = 1.5
    """Aspect ratio from which a component is long."""
    many_parts: Annotated[int, Field(ge=1)] = 20
    """Number of SAM segments beyond which a long component is tiled along its length."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the foreground components with the highest scores, whose mean is the image's score."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous."""

    @property
    def loads_encoder(self) -> bool:
        return True

    @property
    def prompts(self) -> None:
        return None
