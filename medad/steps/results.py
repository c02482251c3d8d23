"""What steps hand to one another and to reports: names, and where results lie.

`F` is the folder of a result: a `Path` for the methods; whoever keeps results may have references of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from medad.base.errors import CaseFailure
from medad.config.liver import InferenceSettings, PostprocessSettings, PreprocessSettings

F = TypeVar("F")


@dataclass(frozen=True)
class CaseResult(Generic[F]):
    """One finished case: the folders that `medad.steps.cases` filled."""

    case_id: str
    prepared: F
    segmented: F | None = None
    """None for the baseline, which has no networks."""
    evaluated: F | None = None
    """None where no truth was given."""
    inserted: F | None = None
    """None where no lesion was inserted."""


@dataclass(frozen=True)
class Segmenter(Generic[F]):
    """How scans are prepared and segmented."""

    preprocess: PreprocessSettings
    restoration: F
    segmentation: F
    """Folders of the trained networks."""
    inference: InferenceSettings
    postprocess: PostprocessSettings


@dataclass(frozen=True)
class VolumeResult(Generic[F]):
    """The record of one volume of inserted lesions."""

    case_id: str
    folder: F
    """Folder of `medad.steps.inserted.measure_inserted`."""


@dataclass(frozen=True)
class VariantResult(Generic[F]):
    """One variant with all that was trained of it."""

    group: str
    name: str
    seeds: Mapping[int, Sequence[CaseResult[F]]]
    """Seed -> its evaluated cases, at least one. A seed that failed is left out."""
    examples: F | None = None
    """Folder of `medad.steps.examples.write_examples`, for the first seed."""


@dataclass(frozen=True)
class SnapshotResult(Generic[F]):
    """One length of phase two."""

    epochs: int
    seeds: Mapping[int, Sequence[CaseResult[F]]]


@dataclass(frozen=True)
class EmbeddingResult(Generic[F]):
    """Features of `medad.steps.embedding.write_features`, and whose they are."""

    row: str
    seed: int
    folder: F


@dataclass(frozen=True)
class AblationResults(Generic[F]):
    """All that the report of an ablation is made from."""

    variants: Sequence[VariantResult[F]]
    snapshots: Sequence[SnapshotResult[F]] = ()
    baseline: Sequence[CaseResult[F]] = ()
    embedding: EmbeddingResult[F] | None = None
    inserted: Sequence[str] = ()
    """Ids of test cases whose lesions were inserted."""
    failures: Sequence[CaseFailure] = ()
