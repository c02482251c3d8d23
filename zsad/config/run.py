"""Settings of the flow `zsad`: frozen, typed, units in the names. The defaults are the paper's (002).

Presets are values, not classes: `encoder.preset` fills what the file leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medad.base.private import DataRoot, ModelFile, ModelName
from medad.base.settings import Fraction, MachineSettings, RunName, Settings, load_settings, parse_settings
from zsad.config.layouts import PublicSetName

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

Variant = Literal["text", "text_tta", "visual", "joint", "joint_tta"]
"""Which evidence a score uses (rows of table 3): the text's alone, with adaptation, the reference image's alone, both,
both with adaptation (the method)."""

WITH_REFERENCES: frozenset[Variant] = frozenset({"visual", "joint", "joint_tta"})
WITH_ADAPTATION: frozenset[Variant] = frozenset({"text_tta", "joint_tta"})
WITHOUT_REFERENCES: dict[Variant, Variant] = {"visual": "text", "joint": "text", "joint_tta": "text_tta"}
"""Variants that take the place of `WITH_REFERENCES` where there is no other image to compare with."""
NO_REFERENCE_NOTE = "There was no second image to compare with, so the prompts alone were used (variant {variant})."

PRESETS: dict[str, dict[str, Any]] = {
    # AnoVL and 002: every block, no feed-forward, the class token as CLIP makes it
    "anovl": {"vv_blocks": "all", "vv_feed_forward": False, "class_ln_post": True, "size_px": None},
    # AnomalyCLIP: the last 19 of 24 blocks at 518 px, class token by the projection without ln_post
    "anomalyclip": {"vv_blocks": 19, "vv_feed_forward": False, "class_ln_post": False, "size_px": 518},
}


class ImagesSettings(Settings):
    """The images: their folder and the layout of their files.

    `mvtec`: CATEGORY/test/DEFECT/x.png with CATEGORY/ground_truth/DEFECT/x_mask.png, `good` = normal.
    `visa`: CATEGORY/Data/Images/{Normal,Anomaly}, CATEGORY/Data/Masks/Anomaly, split by split_csv if there.
    `folder`: one category; sub-folders as labels (`good` = normal) with masks of the same stems, or just images.
    The other names are public sets as their publishers ship them, see `zsad.config.layouts`; `auto` does not look
    for them.
    """

    root: DataRoot
    """Folder of the images; `samples:NAME` is a folder of the sample data."""
    layout: Literal["auto", "mvtec", "visa", "folder", PublicSetName] = "auto"
    """Layout of the files, see above."""
    categories: tuple[str, ...] | None = None
    """Categories to use. None: all."""
    category: str | None = None
    """Object that a set of one category shows, in words for the prompts. None: the folder's name, or the declared
    one."""
    masks: DataRoot | None = None
    """Folder of masks, relative to root, layout `folder` alone. None: `ground_truth` or `masks` where there is one."""
    visa_split: Literal["1cls", "2cls_highshot", "2cls_fewshot"] = "1cls"
    """Split of VisA, by split_csv/NAME.csv. Zero-shot methods are measured on 1cls."""
    pseudonyms: bool = False
    """Digests as image ids instead of file names."""


class EncoderSettings(Settings):
    """An open_clip ViT and its second path of V-V attention (eq. 4)."""

    preset: Literal["anovl", "anomalyclip"] = "anovl"
    """Values that the file leaves out. `anovl`: AnoVL's and 002's. `anomalyclip`: AnomalyCLIP's, at 518 px."""
    model: ModelName = "ViT-B-16-plus-240"
    """Model of open_clip; `embedded`, our own small one; or `local-dir:FOLDER` with open_clip_config.json."""
    weights: ModelFile | None = None
    """File of weights (open_clip, OpenAI or safetensors)."""
    tag: str | None = None
    """Pretrained tag of open_clip, used without `weights`. It downloads what the local hub cache lacks."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of random weights, for tests and benchmarks alone. Every output says so."""
    vv_blocks: Literal["all"] | Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] = "all"
    """Blocks with V-V attention: all, the last n, or by number from 0 (rising)."""
    vv_feed_forward: bool = False
    """Feed-forward of the blocks on the V-V path."""
    vv_temperature: Positive = 1.0
    """Divisor of the logits of V-V attention, beside the square root of the head's width."""
    vv_attention: Literal["vv", "qq", "kk"] = "vv"
    """Queries and keys in those blocks (001, DPAM): values, queries or keys."""
    class_ln_post: bool = True
    """Normalisation of the class token by ln_post before the projection."""
    size_px: Annotated[int, Field(ge=16, le=2048)] | None = None
    """Side of the square that the encoder sees. None: the model's own."""
    max_crops: Annotated[int, Field(ge=2)] = 64
    """Largest number of square crops of an image. Longer images are refused."""
    min_side_px: Annotated[int, Field(ge=1)] = 8
    """Smallest side of an image. Smaller images are refused."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Crops encoded at a time."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return PRESETS.get(str(values.get("preset", "anovl")), {}) | dict(values)
        return values

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> EncoderSettings:
        own = self.model == "embedded" or self.model.startswith("local-dir:")
        given = [name for name in ("weights", "tag", "seed") if getattr(self, name) is not None]
        if own and given:
            raise ValueError(f"model {self.model} brings its own weights; leave out {given[0]}")
        if not own and len(given) != 1:
            raise ValueError(
                "give the weights by exactly one of weights (a local file), tag (may download) or seed (random)"
            )
        return self


PromptStyle = Literal["supplement", "winclip", "clip"]
"""`supplement`: 002's; `winclip`: WinCLIP's compositional ensemble; `clip`: one plain prompt a side."""


class PromptSettings(Settings):
    """The ensemble of the supplement: 22 templates x 7 states x domains on either side; or another system's."""

    style: PromptStyle = "supplement"
    """Lists of prompts. `supplement`: 002's. `winclip`: WinCLIP's ensemble. `clip`: one plain prompt per side."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Domain words, style `supplement` alone. None: the supplement's, by category."""
    surface_categories: tuple[str, ...] = ("carpet", "leather", "grid", "tile", "wood")
    """Categories with the domain words industrial, textural, surface. Others have industrial, manufacturing."""
    names: dict[str, str] = Field(default_factory=dict)
    """Words for categories, as `{magnetic_tile: magnetic tile}`. Other names lose their underscores."""


class ReferenceSettings(Settings):
    """The other images that a query is compared with (eq. 5, figure 5a)."""

    count: Annotated[int, Field(ge=0, le=64)] = 1
    """Number of reference images per query."""
    aggregate: Literal["min", "mean", "median"] = "min"
    """Aggregate of each patch's distances over references."""


class ScoreSettings(Settings):
    """Eq. 1-6, 12 and 13."""

    tau: Positive = 1.0
    """Temperature of eq. 1-3: AnoVL 1, WinCLIP 0.07, CLIP 0.01."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("joint_tta",)
    """Variants to score: evidence of the prompts alone, with adaptation, of the reference image, or of both. The
    last one's maps are shown."""
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
    lambda_text: NotNegative = 1.0
    """Weight of A_L in the map without adaptation (eq. 6: 1)."""
    references: ReferenceSettings = ReferenceSettings()
    """Reference images."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images scored, and adapted, at a time."""

    @model_validator(mode="after")
    def _variants_can_be_scored(self) -> ScoreSettings:
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants {list(self.variants)} name one twice")
        if self.references.count == 0 and (bad := [v for v in self.variants if v in WITH_REFERENCES]):
            raise ValueError(f"references.count 0 leaves nothing for {bad[0]}; score text or text_tta")
        return self

    def without_references(self) -> ScoreSettings:
        """Return the settings for an image without another one: each variant keeps only what the text says."""
        left = tuple(dict.fromkeys(WITHOUT_REFERENCES.get(variant, variant) for variant in self.variants))
        return self.model_copy(update={"variants": left})


class AdaptSettings(Settings):
    """Test-time adaptation, eq. 7-11, from scratch for each image."""

    learning_rate: Positive = 1e-3
    """Learning rate of AdamW."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 2
    """Steps of adaptation."""
    beta: NotNegative = 0.5
    """Weight of the similarity loss (eq. 11)."""
    weight_decay: NotNegative = 0.01
    """Weight decay of AdamW, towards zero."""
    textures: DataRoot | None = None
    """Folder of texture images (such as DTD). None: textures are generated."""
    opacity: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Range of the texture's opacity: DRAEM's 1 - beta, with beta ~ U(0, 0.8)."""
    min_mask_patches: Annotated[int, Field(ge=1)] = 1
    """Smallest number of patches that a mask touches. A smaller mask is replaced."""


class EvaluationSettings(Settings):
    """Comparison of maps with masks."""

    size_px: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Shorter side of map and mask. None: the encoder's."""
    smoothing_sigma_px: NotNegative = 0.0
    """Standard deviation of a Gaussian over the upsampled map."""
    max_fpr: Annotated[float, Field(gt=0, le=1)] = 0.3
    """False positive rate at which PRO's integral ends."""
    pro_200: bool = True
    """AUPRO over 200 linear thresholds, as in the literature, beside the exact one."""
    threshold_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Quantile of a category's unlabelled image scores that is the deployable threshold."""
    threshold: float | None = None
    """Threshold on the image's score, in place of the quantile."""


class ZsadSettings(MachineSettings):
    """Everything one run of the flow depends on."""

    name: RunName
    """Name of the run and its folder."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4, 5)
    """Seeds of reference images and pseudo anomalies. Figures are mean and standard deviation over them."""
    data: ImagesSettings
    """Images."""
    encoder: EncoderSettings
    """Encoder."""
    prompts: PromptSettings = PromptSettings()
    """Prompts."""
    score: ScoreSettings = ScoreSettings()
    """Scores."""
    adapt: AdaptSettings = AdaptSettings()
    """Test-time adaptation."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Comparison with the masks."""
    published: Literal["mvtec", "visa"] | None = None
    """Benchmark whose published row stands beside ours, labelled as the paper's."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> ZsadSettings:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name one twice")
        return self


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> ZsadSettings:
    """Read a YAML configuration, with values by dotted key put over the file's. Raises ConfigError."""
    return load_settings(ZsadSettings, path, overrides)


def parse(values: Mapping[str, Any], *, source: str) -> ZsadSettings:
    """Validate settings already read; `source` names them in the error. Raises ConfigError."""
    return parse_settings(ZsadSettings, values, source=source)
