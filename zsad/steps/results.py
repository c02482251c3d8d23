"""What steps hand to one another and to reports: names, and where results lie.

`F` is the folder of a result: a `Path` for the methods; whoever keeps results may have references of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from zsad.clip.models import EncoderInfo
from zsad.config.compare import Ablation
from zsad.config.system_base import SystemSettings
from zsad.data.labelled import LabelledImage

F = TypeVar("F")


@dataclass(frozen=True)
class Source(Generic[F]):
    """One category of the auxiliary images that a learned system is trained on."""

    name: str
    """Category in words, for prompts that a system makes itself."""
    features: F
    """Folder of `encode_images`, with the system's outputs."""
    text: F | None
    """Folder of `encode_category_text` in the system's style; None for a system that makes its own prompts."""
    items: Sequence[LabelledImage]
    """Labels and masks, by digest. Images without features are passed over."""


@dataclass(frozen=True)
class CategoryResult(Generic[F]):
    """One scored category."""

    name: str
    images: tuple[LabelledImage, ...]
    """Any order. Those without scores are passed over; they belong into the failures."""
    text: F
    """Folder of `encode_category_text`."""
    features: F
    """Folder of `encode_images`."""
    scores: Mapping[int, F]
    """Seed -> folder of `score_category`. At least one."""
    evaluated: Mapping[int, F]
    """Seed -> folder of `evaluate_category`; the same seeds."""


@dataclass(frozen=True)
class Cost:
    """What one system's scores of one category with one seed took."""

    scoring_s: float
    encoding_s: float
    """Time of the one pass of its encoder over the category, which all systems and seeds of that encoder share."""
    images: int
    peak_memory_bytes: int | None = None
    """Peak while scoring. None: not measured."""


@dataclass(frozen=True)
class Evaluated(Generic[F]):
    """One category, one seed."""

    folder: F
    """Folder of `evaluate_category`."""
    cost: Cost | None = None
    """None where it was not measured, as for a result that was at hand already."""


@dataclass(frozen=True)
class SystemResult(Generic[F]):
    """One system with all that was scored by it."""

    system: SystemSettings
    encoder: EncoderInfo
    categories: Mapping[str, Mapping[int, Evaluated[F]]]
    """Category -> seed -> result. A category that failed is left out. A system that does not depend on the seed has
    one seed; were there more, the lowest is taken."""


@dataclass(frozen=True)
class AblationRow(Generic[F]):
    """One row of an ablation."""

    label: str
    """Name that `ablation_systems` gives it."""
    categories: Mapping[str, Mapping[int, F]]
    """Category -> seed -> folder of `evaluate_category`. What failed is left out."""


@dataclass(frozen=True)
class AblationResult(Generic[F]):
    """One ablation."""

    ablation: Ablation
    rows: Sequence[AblationRow[F]]
