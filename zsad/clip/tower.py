"""Interface of an image tower, and the result of loading one. Towers with text add methods for prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from zsad.config.encoder_outputs import PATCHES, EncoderOutput


class ImageTower(ABC):
    """Frozen image tower in evaluation mode. Images are normalised and in the tower's number format.

    Nothing that it returns is L2-normalised.
    """

    @property
    @abstractmethod
    def module(self) -> Any:
        """The image tower alone, as a module."""

    @property
    @abstractmethod
    def size_px(self) -> int:
        """Side of the square input images."""

    @property
    @abstractmethod
    def grid(self) -> int:
        """Number of patches per side."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Dimension D of class tokens and of the output `patches`."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Dimension W of the tokens."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of blocks."""

    @abstractmethod
    def check(self, output: EncoderOutput, model: str) -> None:
        """Raise ConfigError if the tower lacks an output. `model` describes it in the message."""

    @abstractmethod
    def outputs(
        self, images: Float[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> tuple[Float[Tensor, "B D"], dict[str, Float[Tensor, "B _ _"]]]:
        """Return class tokens, and the wanted outputs by name. Nothing else is computed."""

    def outputs_alone(
        self, images: Float[Tensor, "B 3 S S"], wanted: Sequence[EncoderOutput]
    ) -> dict[str, Float[Tensor, "B _ _"]]:
        """Return the wanted outputs by name, without class tokens. A tower may compute less for it."""
        return self.outputs(images, wanted)[1]

    def patches(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        """Return only the output `patches`."""
        return self.outputs_alone(images, (EncoderOutput.parse(PATCHES),))[PATCHES]


@dataclass(frozen=True)
class Loaded:
    """A tower with what belongs to its weights.

    Attributes
    ----------
    tower
        The tower.
    architecture
        Description of the architecture as JSON values, with the image size.
    weights
        Digest `sha256:...` of the weights file, or `seed:...`.
    mean, std
        Mean and standard deviation of the training images, for values 0..1 in red, green and blue.
    notes
        Notes for the user, one sentence or two each.
    """

    tower: ImageTower
    architecture: Mapping[str, Any]
    weights: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
