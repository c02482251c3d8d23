"""Settings of AnomalyCLIP."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import NotNegative, Positive
from zsad.config.system_base import LearnedSettings, Training


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
    """Full stop at the end of the prompts. The paper shows none, but the public checkpoints were trained with one. With
    a `checkpoint`, its value is used unless a configuration states another; so are the other sizes of the prompts."""
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
