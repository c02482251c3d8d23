"""Settings of systems that need further weights besides the encoder: trained systems and segmentation models.

Their base class is in `zsad.config.system_base`. `zsad.config.systems` joins them with the other systems.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medad.base.private import ModelFile
from medad.base.settings import Fraction, Settings
from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import NotNegative, Positive, PromptStyle
from zsad.config.system_base import VIT_L_BLOCKS, Blocks, SystemSettings, block_outputs


class Training(Settings):
    """Training of a learned system with the optimiser Adam, on images with masks."""

    epochs: Annotated[int, Field(ge=1)]
    """Number of passes over the training images."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images per batch."""
    learning_rate: Positive
    """Learning rate of Adam."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the order of the images."""


class LearnedSettings(SystemSettings):
    """Settings of a system that is trained on auxiliary images and then used on other images. The encoder stays
    frozen."""

    checkpoint: ModelFile | None = None
    """Checkpoint written by `adflows zsad train`. None: the run trains the system, on `auxiliary` or on the other
    categories."""
    fixed_by_training: ClassVar[tuple[str, ...]]
    """Names of the settings that must equal those of the training. Otherwise the checkpoint is refused."""

    @property
    def trained(self) -> bool:
        return True


class AprilGan(LearnedSettings):
    """APRIL-GAN (VAND challenge): one trained linear layer per block maps patches to the space of the prompts."""

    title: ClassVar[str] = "APRIL-GAN"
    source: ClassVar[str] = "Chen et al., APRIL-GAN (VAND challenge 2023)"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, blocks 6, 12, 18, 24; trained on the other data set"
    system: Literal["april_gan"] = "april_gan"
    """Name of the system."""
    blocks: Blocks = VIT_L_BLOCKS
    """Blocks of the image tower with a linear layer each, counted from 1."""
    scale: Positive = 100.0
    """Factor on the cosines before the softmax, for the class token and the patches."""
    map_share: Fraction = 0.0
    """Weight of the map's maximum in the image's score. The rest is the weight of the class token. Published: 0 for
    zero-shot, 0.5 for few-shot."""
    fixed_by_training: ClassVar[tuple[str, ...]] = ("blocks",)
    """Names of the settings that must equal those of the training."""
    training: Training = Training(epochs=3, batch_size=16, learning_rate=1e-3)
    """Training, used without a `checkpoint`."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return block_outputs(self.blocks)

    @property
    def prompts(self) -> PromptStyle:
        return "winclip"


class AnomalyClip(LearnedSettings):
    """AnomalyCLIP (Zhou et al., ICLR 2024): learned prompts and further learned tokens in the text tower.

    There is one normal and one anomalous prompt. Equation numbers are those of the AnomalyCLIP paper.
    """

    title: ClassVar[str] = "AnomalyCLIP"
    source: ClassVar[str] = "Zhou et al., AnomalyCLIP (ICLR 2024)"
    published: ClassVar[str] = "ViT-L-14-336, openai, 518 px, encoder preset anomalyclip; trained on the other data set"
    system: Literal["anomalyclip"] = "anomalyclip"
    """Name of the system."""
    prompt: Literal["object_agnostic", "object_aware"] = "object_agnostic"
    """Kind of prompt. `object_agnostic`: without the object's name. `object_aware`: with it."""
    context_tokens: Annotated[int, Field(ge=1)] = 12
    """Number E of learned words in each of the two prompts."""
    full_stop: bool = False
    """Full stop at the end of the prompts. The paper shows none, but the public checkpoints were trained with one."""
    deep_tokens: Annotated[int, Field(ge=0)] = 4
    """Number Q of learned tokens per layer of the text tower (eq. 3), at most E. 0: none."""
    depth: Annotated[int, Field(ge=1)] = 9
    """Number M' of layers of the text tower with learned tokens. In the first layer these are the prompt's words."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous prompts."""
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Blocks after which the patches of the V-V path are scored, counted from 1. An empty list: only the last block, as
    published."""
    lambda_local: NotNegative = 4.0
    """Weight lambda of the local loss (eq. 2)."""
    losses: Annotated[tuple[Literal["global", "local"], ...], Field(min_length=1)] = ("global", "local")
    """Losses of the training. `global`: on the image's label. `local`: on the mask."""
    sigma_px: NotNegative = 4.0
    """Standard deviation of the Gaussian filter on the map. 0: no filter."""
    fixed_by_training: ClassVar[tuple[str, ...]] = ("prompt", "context_tokens", "full_stop", "deep_tokens", "depth")
    """Names of the settings that must equal those of the training."""
    training: Training = Training(epochs=15, batch_size=8, learning_rate=1e-3)
    """Training, used without a `checkpoint`."""

    @property
    def loads_encoder(self) -> bool:
        return True

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the encoder outputs of the blocks in the set M of eq. 2."""
        return tuple(f"vv-{number}" for number in self.blocks) or (PATCHES,)

    @model_validator(mode="after")
    def _deep_tokens_fit(self) -> AnomalyClip:
        # section 3.3 demands Q < P; the shortest prompt has E learned words and the object's name
        if self.deep_tokens > self.context_tokens:
            raise ValueError(f"deep_tokens {self.deep_tokens} must not exceed context_tokens {self.context_tokens}")
        return self


class SegmentationModels(SystemSettings):
    """Method of the segmentation-model paper (Baugh et al., 2023), built from pretrained segmentation models.

    SAM and a salient-object model find the foreground, which is cut into tiles. CLIP scores each tile, and CLIPSeg
    scores its pixels.
    """

    title: ClassVar[str] = "Segmentation models"
    source: ClassVar[str] = "Baugh et al., Zero-Shot AD with Pre-trained Segmentation Models (VAND challenge 2023)"
    published: ClassVar[str] = "CLIP, CLIPSeg, SAM and a dichotomous segmentation model; VisA"
    system: Literal["segmentation"] = "segmentation"
    """Name of the system."""
    clipseg: ModelFile | None = None
    """Folder of a CLIPSeg model in the format of the library transformers."""
    sam: ModelFile | None = None
    """Folder of a SAM model in the format of the library transformers."""
    sam_points_per_side: Annotated[int, Field(ge=1, le=256)] = 32
    """Number of points per side of the grid of points that prompt SAM. The default is SAM's own."""
    sam_min_iou: NotNegative = 0.88
    """Smallest IoU that SAM must predict for a mask to be used. The default is SAM's own. 0: all masks are used."""
    sam_min_stability: NotNegative = 0.95
    """Smallest stability score of a SAM mask to be used. The default is SAM's own. 0: all masks are used."""
    sam_max_box_iou: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Largest IoU of the bounding boxes of two masks. Above it, one of them is dropped. The default is SAM's own."""
    salient: ModelFile | None = None
    """TorchScript file of a salient-object (dichotomous) segmentation model. It maps an image with values 0 to 1 to one
    channel."""
    salient_px: Annotated[int, Field(ge=32, le=4096)] = 1024
    """Side of the square input of the salient-object model."""
    salient_output: Literal["probability", "logits"] = "probability"
    """Meaning of the salient-object model's output values."""
    foreground_px: Annotated[int, Field(ge=32, le=8192)] = 1024
    """Longest side to which an image is resized before the foreground is found. The default is SAM's input size."""
    covered: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Smallest share of a SAM segment that must lie in the salient object for the segment to be foreground."""
    tile_px: Annotated[int, Field(ge=16, le=4096)] = 352
    """Smallest side of a tile. The default is CLIPSeg's input size."""
    long_aspect: Annotated[float, Field(gt=1)] = 1.5
    """Smallest aspect ratio of a foreground component that is treated as long."""
    many_parts: Annotated[int, Field(ge=1)] = 20
    """Number of SAM segments above which a long component is cut into tiles along its length."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the foreground components, those with the highest scores, over which the image's score is averaged."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous prompts."""

    @property
    def loads_encoder(self) -> bool:
        return True

    @property
    def prompts(self) -> None:
        return None
