"""Settings of the dual-image method."""

from __future__ import annotations

from typing import ClassVar, Literal

from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import AdaptSettings, NotNegative, Positive, PromptStyle, ReferenceSettings, ScoreSettings
from zsad.config.system_base import SystemSettings


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
    references: ReferenceSettings = ReferenceSettings()
    """Reference images."""
    adapt: AdaptSettings = AdaptSettings()
    """Test-time adaptation."""

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
        """Variant of `ScoreSettings` that these settings select."""
        if not self.references.count:
            return "text_tta" if self.adaptation else "text"
        return "joint_tta" if self.adaptation else "joint"

    @property
    def score(self) -> ScoreSettings:
        """These settings in the form that `zsad.steps.score_dual` takes."""
        names = ("tau", "lambda_1", "lambda_2", "lambda_3", "lambda_4", "lambda_5", "references")
        return ScoreSettings(variants=(self.variant,), **{name: getattr(self, name) for name in names})
