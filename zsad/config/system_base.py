"""Base classes of the settings of all systems.

Each system's settings are in the folder of its method: `zsad/scorers/METHOD/settings.py`. `zsad.config.systems` joins
all of them into the union `System`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from medad.base.private import ModelFile
from medad.base.settings import Settings
from zsad.config.run import Positive, PromptStyle

Blocks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
"""Numbers of blocks of the image tower, counted from 1 as in the papers."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,39}$")]

VIT_L_BLOCKS = (6, 12, 18, 24)
ONLY_VARIANT = "system"
"""Name of the scores of a system that has one score per image."""


def block_outputs(blocks: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the encoder outputs of these blocks."""
    return tuple(f"block-{number}" for number in blocks)


class SystemSettings(Settings):
    """Settings that all systems have in common."""

    title: ClassVar[str]
    """Name in papers."""
    source: ClassVar[str]
    """Paper of the system."""
    published: ClassVar[str]
    """Configuration behind the published figures, in words."""
    scorer_name: ClassVar[str] = "score"
    """Name of the function that scores a category: `score(category_features, settings)`."""
    encoder: str = "main"
    """Name of the system's encoder in `encoders`."""
    align_corners: bool = False
    """Position of the patches when a map is enlarged to the crop. `true`: the corner patches are at the corner pixels.
    `false`: each patch is at the centre of its pixels."""
    label: Label | None = None
    """Name in tables, needed if a system occurs more than once. None: the system's title."""

    @property
    def display_name(self) -> str:
        """Name in tables and on the command line."""
        return self.label or self.title

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the encoder outputs (`zsad.config.encoder_outputs`) that the system reads besides class tokens."""
        return ()

    @property
    def reads_class_tokens(self) -> bool:
        """Whether the system reads class tokens."""
        return True

    @property
    def prompts(self) -> PromptStyle | None:
        """Style of the prompts that the system reads as text features. None: it reads none or encodes its own."""
        return None

    @property
    def variant_names(self) -> tuple[str, ...]:
        """Names of the scores that the system gives each image. The last one is that of tables and maps."""
        return (ONLY_VARIANT,)

    @property
    def reference_count(self) -> int:
        """Number of reference images that the seed chooses for each image."""
        return 0

    @property
    def compares_images(self) -> bool:
        """Whether the score of an image depends on the other images that are scored."""
        return self.reference_count > 0

    @property
    def seeded(self) -> bool:
        """Whether the scores depend on the seed."""
        return self.reference_count > 0 or self.shot_count > 0

    @property
    def trained(self) -> bool:
        """Whether the system must be trained on auxiliary images with labels and masks before it can score."""
        return False

    @property
    def loads_encoder(self) -> bool:
        """Whether scoring loads the encoder, to encode prompts or images that are not among the stored features."""
        return False

    @property
    def shot_count(self) -> int:
        """Number of normal images that the system needs: its field `shots`. 0: none."""
        return int(getattr(self, "shots", 0))

    @property
    def scorer(self) -> str:
        """Function `package.module:function` that scores a category, in the module `score` beside the settings."""
        return f"{type(self).__module__.removesuffix('settings')}score:{self.scorer_name}"

    @property
    def accepts_shots(self) -> bool:
        """Whether the system can use normal images. It then has the field `shots`."""
        return "shots" in type(self).model_fields

    @property
    def turn_count(self) -> int:
        """Number of copies of each normal image, turned by equal steps of a full circle. 1: the image alone."""
        return 1


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
