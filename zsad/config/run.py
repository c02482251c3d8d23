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
from zsad.config.layouts import DeclaredName

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

Variant = Literal["text", "text_tta", "visual", "joint", "joint_tta"]
"""Which evidence a score uses (rows of table 3): the text's alone, with adaptation, the reference image's alone, both,
both with adaptation (the method)."""

WITH_REFERENCES: frozenset[Variant] = frozenset({"visual", "joint", "joint_tta"})
WITH_ADAPTATION: frozenset[Variant] = frozenset({"text_tta", "joint_tta"})
ALONE: dict[Variant, Variant] = {"visual": "text", "joint": "text", "joint_tta": "text_tta"}
"""Variants that take the place of `WITH_REFERENCES` where there is no other image to compare with."""
ALONE_NOTE = "There was no second image to compare with, so the prompts alone were used (variant {variant})."

PRESETS: dict[str, dict[str, Any]] = {
    # AnoVL and 002: every block, no feed-forward, the class token as CLIP makes it
    "anovl": {"vv_blocks": "all", "vv_feed_forward": False, "class_ln_post": True, "size_px": None},
    # AnomalyCLIP: the last 19 of 24 blocks at 518 px, class token by the projection without ln_post
    "anomalyclip": {"vv_blocks": 19, "vv_feed_forward": False, "class_ln_post": False, "size_px": 518},
}


class ImagesSettings(Settings):
    """Where the images are and how they are laid out.

    `mvtec`: CATEGORY/test/DEFECT/x.png with CATEGORY/ground_truth/DEFECT/x_mask.png, `good` = normal.
    `visa`: CATEGORY/Data/Images/{Normal,Anomaly}, CATEGORY/Data/Masks/Anomaly, split by split_csv if there.
    `folder`: one category; sub-folders as labels (`good` = normal) with masks of the same stems, or just images.
    The other names are public sets as their publishers ship them, see `zsad.config.layouts`; `auto` does not look
    for them.
    """

    root: DataRoot
    """A folder; `samples:NAME` is a folder of the sample data."""
    layout: Literal["auto", "mvtec", "visa", "folder", DeclaredName] = "auto"
    categories: tuple[str, ...] | None = None
    """Categories to use. None: all."""
    category: str | None = None
    """What a set of one category shows, in words for the prompts. None: the folder's name, or the declared one."""
    masks: DataRoot | None = None
    """Layout `folder`: a folder of masks, relative to root. None: `ground_truth` or `masks` where there is one."""
    visa_split: Literal["1cls", "2cls_highshot", "2cls_fewshot"] = "1cls"
    """Layout `visa`: whose test images, of split_csv/NAME.csv. Zero-shot methods are measured on 1cls."""
    opaque_ids: bool = False
    """Name images by a digest instead of by file name."""


class EncoderSettings(Settings):
    """An open_clip ViT and its second path of V-V attention (eq. 4)."""

    preset: Literal["anovl", "anomalyclip"] = "anovl"
    model: ModelName = "ViT-B-16-plus-240"
    """A model of open_clip; `embedded`, our own small one; or `local-dir:FOLDER` with open_clip_config.json."""
    weights: ModelFile | None = None
    """A local file (open_clip, OpenAI or safetensors)."""
    tag: str | None = None
    """A pretrained tag of open_clip, used when `weights` is None; downloads unless it is in the local hub cache."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Random weights of this seed: for tests and benchmarks alone. Every output says so."""
    vv_blocks: Literal["all"] | Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] = "all"
    """Blocks with V-V attention: all, the last n, or by number from 0 (rising)."""
    vv_feed_forward: bool = False
    """Whether the V-V path also runs the blocks' feed-forward."""
    vv_temperature: Positive = 1.0
    """Divides the logits of V-V attention, beside its 1/sqrt(head width)."""
    vv_attention: Literal["vv", "qq", "kk"] = "vv"
    """What is both queries and keys in those blocks (001, DPAM): values, queries or keys."""
    class_ln_post: bool = True
    """Whether the class token passes ln_post before the projection."""
    size_px: Annotated[int, Field(ge=16, le=2048)] | None = None
    """Side of the square the encoder sees. None: the model's own."""
    max_crops: Annotated[int, Field(ge=2)] = 64
    """An image so long that it needs more square crops than this is refused."""
    min_side_px: Annotated[int, Field(ge=1)] = 8
    """An image with a shorter side than this is refused."""
    batch_size: Annotated[int, Field(ge=1)] = 16

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
    """Whose lists. Domains belong to the supplement's alone."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Domain words. None: the supplement's, by category."""
    surface_categories: tuple[str, ...] = ("carpet", "leather", "grid", "tile", "wood")
    """Categories whose domain words are industrial, textural, surface; all others industrial, manufacturing."""
    names: dict[str, str] = Field(default_factory=dict)
    """Category -> how the prompts call it, as {"magnetic_tile": "magnetic tile"}. Others: underscores become spaces."""


class ReferenceSettings(Settings):
    """The other images that a query is compared with (eq. 5, figure 5a)."""

    count: Annotated[int, Field(ge=0, le=64)] = 1
    aggregate: Literal["min", "mean", "median"] = "min"
    """Over references, of each patch's distance."""


class ScoreSettings(Settings):
    """Eq. 1-6, 12 and 13."""

    tau: Positive = 1.0
    """Temperature of eq. 1-3: AnoVL 1, WinCLIP 0.07, CLIP 0.01."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("joint_tta",)
    """Systems to score; the last one's maps are shown."""
    lambda_1: NotNegative = 1.0
    """A_V in the map (eq. 12)."""
    lambda_2: NotNegative = 1.5
    """A_T in the map (eq. 12)."""
    lambda_3: NotNegative = 1.0
    """The class token's score (eq. 13)."""
    lambda_4: NotNegative = 1.0
    """max A_V in the image's score (eq. 13)."""
    lambda_5: NotNegative = 1.0
    """max A_T in the image's score (eq. 13)."""
    lambda_text: NotNegative = 1.0
    """A_L in the map where there is no adaptation (eq. 6: 1)."""
    references: ReferenceSettings = ReferenceSettings()
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images scored, and adapted, at a time."""

    @model_validator(mode="after")
    def _variants_can_be_scored(self) -> ScoreSettings:
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants {list(self.variants)} name one twice")
        if self.references.count == 0 and (bad := [v for v in self.variants if v in WITH_REFERENCES]):
            raise ValueError(f"references.count 0 leaves nothing for {bad[0]}; score text or text_tta")
        return self

    def alone(self) -> ScoreSettings:
        """Return the settings for an image without another one: each variant keeps only what the text says."""
        left = tuple(dict.fromkeys(ALONE.get(variant, variant) for variant in self.variants))
        return self.model_copy(update={"variants": left})


class AdaptSettings(Settings):
    """Test-time adaptation, eq. 7-11, from scratch for each image."""

    learning_rate: Positive = 1e-3
    steps: Annotated[int, Field(ge=1, le=1000)] = 2
    beta: NotNegative = 0.5
    weight_decay: NotNegative = 0.01
    """AdamW's; decays towards zero, as torch does it."""
    textures: DataRoot | None = None
    """A folder of texture images (such as DTD). None: textures are generated."""
    opacity: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Range of the overlaid texture's opacity: DRAEM's 1 - beta, beta ~ U(0, 0.8)."""
    min_mask_patches: Annotated[int, Field(ge=1)] = 1
    """A Perlin mask that touches fewer patches is drawn again."""


class EvaluationSettings(Settings):
    """At which size maps are compared with masks, and how."""

    size_px: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Shorter side of map and mask. None: the encoder's."""
    smoothing_sigma_px: NotNegative = 0.0
    """Gaussian over the upsampled map."""
    max_fpr: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Where PRO's integral ends."""
    pro_200: bool = True
    """Also the literature's AUPRO over 200 linear thresholds."""
    threshold_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """The deployable threshold: this quantile of all unlabelled image scores of a category."""
    threshold: float | None = None
    """A given threshold on the image's score instead of the quantile."""


class ZsadSettings(MachineSettings):
    """Everything one run of the flow depends on."""

    name: RunName
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4, 5)
    """Of the references drawn and of the pseudo anomalies; the figures are mean +- sd over them."""
    data: ImagesSettings
    encoder: EncoderSettings
    prompts: PromptSettings = PromptSettings()
    score: ScoreSettings = ScoreSettings()
    adapt: AdaptSettings = AdaptSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    published: Literal["mvtec", "visa"] | None = None
    """Which published row the report puts beside ours, labelled as the paper's."""

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
