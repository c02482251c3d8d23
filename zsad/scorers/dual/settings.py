"""Settings of the dual-image method."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from zsad.config.encoder_outputs import PATCHES
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
from zsad.config.system_base import SystemSettings


class DualImage(SystemSettings):
    """Dual-image enhanced CLIP (Zhang et al., 2024): prompts and reference images.

    Test-time adaptation is optional. Equation numbers are those of the paper, Dual-Image Enhanced CLIP.
    A_V is the map of distances to the reference images. A_T is the map of the prompts after test-time adaptation.
    """

    title: ClassVar[str] = "Dual-image"
    source: ClassVar[str] = "Zhang et al., Dual-Image Enhanced CLIP (2024)"
    published: ClassVar[str] = "ViT-B-16-plus-240, laion400m_e32, 240 px; one random reference; 6 seeds"
    scorer_name: ClassVar[str] = "score_category"
    """Name of the function that scores a category. It stores the parts of the scores, for other lambdas."""
    system: Literal["dual"] = "dual"
    """Name of the system."""
    adaptation: bool = False
    """Use of test-time adaptation (eq. 7-13)."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] | None = None
    """Variants to score, by the evidence used. `text`: prompts. `visual`: reference images. `joint`: both. `text_tta`
    and `joint_tta`: the same with test-time adaptation. Reports show the maps of the last one. None: `joint` or
    `joint_tta`, by `adaptation`; without reference images `text` or `text_tta`."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous prompts (eq. 1-3). The paper does not state it. At 1,
    AnoVL's value, real text scores differ by less than .012. A_V alone then decides, unlike in table 2 of the paper."""
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
        return 0 if self.shots else self.references.count

    @property
    def seeded(self) -> bool:
        used = set(self.variant_names)
        return not used.isdisjoint(WITH_REFERENCES | WITH_ADAPTATION)

    @property
    def compares_images(self) -> bool:
        return not self.shots and not set(self.variant_names).isdisjoint(WITH_REFERENCES)

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
        """These settings in the form that `zsad.scorers.dual.score` takes."""
        names = ("tau", "lambda_1", "lambda_2", "lambda_3", "lambda_4", "lambda_5", "lambda_text", "references")
        return ScoreSettings(variants=self.variant_names, **{name: getattr(self, name) for name in names})

    def without_references(self) -> DualImage:
        """Return the settings for a category with a single image: each variant uses only the prompts."""
        return self.model_copy(update={"variants": self.score.without_references().variants})
