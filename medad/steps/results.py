"""Results of steps, passed to other steps and to reports: names and folders.

`F` is the type of a result's folder. It is `Path` in this package; the artifact store uses references instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from medad.base.errors import CaseFailure
from medad.config.liver import InferenceSettings, PostprocessSettings, PreprocessSettings

F = TypeVar("F")
PAGE_FILE, PAGES = "case.html", "cases"
"""Name of a case's page in its result, and the folder of a run folder with the pages of all cases."""


@dataclass(frozen=True)
class CaseResult(Generic[F]):
    """One finished case: folders written by `medad.steps.cases`."""

    case_id: str
    prepared: F
    segmented: F | None = None
    """Folder of the segmentation. None: the baseline, which has no networks."""
    evaluated: F | None = None
    """Folder of the evaluation. None: the case has no ground truth."""
    inserted: F | None = None
    """Folder of the inserted lesions. None: no lesion was inserted."""
    page: F | None = None
    """Folder of the case's page. None: the run has no such pages, or this one could not be made."""


@dataclass(frozen=True)
class Member(Generic[F]):
    """One member of a model: two networks and, if the settings have one, a voxel classifier."""

    restoration: F
    """Folder of the trained restoration network."""
    segmentation: F
    """Folder of the trained segmentation network."""
    classifier: F | None = None
    """Folder of the trained voxel classifier."""
    snapshot: str = ""
    """File in the segmentation folder to use. If empty, the final network is used."""


@dataclass(frozen=True)
class Model(Generic[F]):
    """A trained model. The maps of its members are averaged."""

    members: tuple[Member[F], ...]
    """Members, at least one."""
    calibration: F | None = None
    """Folder of the calibrated threshold, written by `medad.steps.calibration.calibrate`."""


@dataclass(frozen=True)
class LeftOut(Generic[F]):
    """A member of a model, with the healthy cases that did not train it."""

    member: Member[F]
    prepared: tuple[F, ...]
    """Folders written by `medad.steps.cases.prepare_case`."""
    copies: tuple[F, ...]
    """Folders written by `medad.anomalies.copies.write_copies`, in the order of `prepared`."""


@dataclass(frozen=True)
class Segmenter(Generic[F]):
    """Settings and model with which scans are prepared and segmented."""

    preprocess: PreprocessSettings
    model: Model[F]
    inference: InferenceSettings
    postprocess: PostprocessSettings


@dataclass(frozen=True)
class VolumeResult(Generic[F]):
    """The record of one volume of inserted lesions."""

    case_id: str
    folder: F
    """Folder written by `medad.steps.inserted.measure_inserted`."""


@dataclass(frozen=True)
class VariantResult(Generic[F]):
    """One variant and its trainings."""

    group: str
    name: str
    seeds: Mapping[int, Sequence[CaseResult[F]]]
    """Evaluated cases of each seed, at least one. A failed seed is left out."""
    examples: F | None = None
    """Folder written by `medad.steps.examples.write_examples` for the first seed."""


@dataclass(frozen=True)
class SnapshotResult(Generic[F]):
    """Results after a number of epochs of phase two."""

    epochs: int
    seeds: Mapping[int, Sequence[CaseResult[F]]]


@dataclass(frozen=True)
class EmbeddingResult(Generic[F]):
    """Features from `medad.steps.embedding.write_features`, with the row and seed of their network."""

    row: str
    seed: int
    folder: F


@dataclass(frozen=True)
class AblationResults(Generic[F]):
    """All results that the report of an ablation needs."""

    variants: Sequence[VariantResult[F]]
    snapshots: Sequence[SnapshotResult[F]] = ()
    baseline: Sequence[CaseResult[F]] = ()
    embedding: EmbeddingResult[F] | None = None
    inserted: Sequence[str] = ()
    """Ids of test cases with inserted lesions."""
    failures: Sequence[CaseFailure] = ()
