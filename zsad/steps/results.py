"""Results that steps pass to one another and to reports: names, and folders of files.

The type `F` is the folder of a result. Steps and reports use a `Path`. A cache may use its own references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from zsad.clip.models import EncoderInfo
from zsad.config.settings import Ablation
from zsad.config.system_base import SystemSettings
from zsad.data.labelled import LabelledImage

F = TypeVar("F")


@dataclass(frozen=True)
class Source(Generic[F]):
    """One category of the auxiliary images for training a learned system."""

    name: str
    """Name of the category in words, for prompts that a system makes itself."""
    features: F
    """Folder of `encode_images`, with the system's outputs."""
    text: F | None
    """Folder of `encode_category_text` in the system's style. None: the system makes its own prompts."""
    items: Sequence[LabelledImage]
    """Labels and masks, by digest. Images without features are ignored."""


@dataclass(frozen=True)
class CategoryResult(Generic[F]):
    """One scored category."""

    name: str
    images: tuple[LabelledImage, ...]
    """Images in any order. Images without scores are ignored; list them as failures."""
    text: F | None
    """Folder of `encode_category_text`. None: the system reads no prompts."""
    features: F
    """Folder of `encode_images`."""
    scores: Mapping[int, F]
    """Folder of `score_system` by seed; at least one."""
    evaluated: Mapping[int, F]
    """Folder of `evaluate_category` by seed, for the same seeds."""
    normal: tuple[LabelledImage, ...] = ()
    """Normal images with which the images were compared. Empty: they were compared with each other, or with prompts."""


@dataclass(frozen=True)
class Cost:
    """Time and memory to score one category by one system with one seed."""

    scoring_s: float
    encoding_s: float
    """Time of the encoder's pass over the category. All systems and seeds with this encoder share it."""
    images: int
    peak_memory_bytes: int | None = None
    """Peak memory while scoring. None: not measured."""


@dataclass(frozen=True)
class Evaluated(Generic[F]):
    """Evaluation of one category with one seed."""

    folder: F
    """Folder of `evaluate_category`."""
    cost: Cost | None = None
    """Time and memory of the scoring. None: not measured, for example because the result came from the cache."""
    scores: F | None = None
    """Folder of `score_system`. None: the maps are not needed."""


@dataclass(frozen=True)
class ScoredInputs(Generic[F]):
    """Images of one category and their features, from which a system's scores were computed."""

    images: tuple[LabelledImage, ...]
    features: F
    """Folder of `encode_images`."""
    text: F | None
    """Folder of `encode_category_text`. None: the system reads no prompts."""
    normal: tuple[LabelledImage, ...] = ()
    """Normal images with which the images were compared."""


@dataclass(frozen=True)
class SystemResult(Generic[F]):
    """One system with all its evaluations."""

    system: SystemSettings
    encoder: EncoderInfo
    categories: Mapping[str, Mapping[int, Evaluated[F]]]
    """Evaluation by category and seed, without categories that failed.

    A system that does not depend on the seed has one seed. If there are more, the lowest is used.
    """
    inputs: Mapping[str, ScoredInputs[F]] = field(default_factory=dict)
    """Images and features by category."""

    def category_results(self) -> tuple[CategoryResult[F], ...]:
        """Return the categories of which inputs and scores are known, in the form that a run's report needs."""
        found = []
        for name, seeds in self.categories.items():
            scored = {seed: one for seed, one in seeds.items() if one.scores is not None}
            if name in self.inputs and scored:
                given = self.inputs[name]
                found.append(
                    CategoryResult(
                        name,
                        given.images,
                        given.text,
                        given.features,
                        {seed: one.scores for seed, one in scored.items() if one.scores is not None},
                        {seed: one.folder for seed, one in scored.items()},
                        given.normal,
                    )
                )
        return tuple(found)


@dataclass(frozen=True)
class AblationRow(Generic[F]):
    """One row of an ablation."""

    label: str
    """Name of the row in `ablation_systems`."""
    categories: Mapping[str, Mapping[int, F]]
    """Folder of `evaluate_category` by category and seed, without failures."""


@dataclass(frozen=True)
class AblationResult(Generic[F]):
    """One ablation with its rows."""

    ablation: Ablation
    rows: Sequence[AblationRow[F]]
