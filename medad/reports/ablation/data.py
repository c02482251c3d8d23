"""Where the results of an ablation lie on disk, and reading what its report needs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medad.base.errors import CaseFailure
from medad.base.text import natural_order
from medad.evaluation.metrics import CaseEvaluation, summarise
from medad.reporting.figures import Stat, statistic
from medad.reports.ablation.document import FIGURES, CaseFigures, SeedFigures

SNAPSHOT = "snapshot-"


@dataclass(frozen=True)
class EvaluatedCase:
    """One test case of one training: the folders that `medad.steps.cases` filled."""

    case_id: str
    prepared: Path
    segmented: Path | None
    """None of the yardstick, which has no networks."""
    evaluated: Path


@dataclass(frozen=True)
class VariantResult:
    """One variant with all that was trained of it."""

    group: str
    name: str
    seeds: Mapping[int, Sequence[EvaluatedCase]]
    """Seed -> its evaluated cases, at least one. A seed that failed is left out."""
    examples: Path | None = None
    """Folder of `medad.steps.examples.write_examples`, of the first seed."""


@dataclass(frozen=True)
class SnapshotResult:
    """One length of phase two."""

    epochs: int
    seeds: Mapping[int, Sequence[EvaluatedCase]]


@dataclass(frozen=True)
class EmbeddingResult:
    """Features of `medad.steps.embedding.write_features`, and whose they are."""

    row: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class AblationResults:
    """All that the report is made from."""

    variants: Sequence[VariantResult]
    snapshots: Sequence[SnapshotResult] = ()
    yardstick: Sequence[EvaluatedCase] = ()
    embedding: EmbeddingResult | None = None
    planted: Sequence[str] = ()
    """Ids of test cases whose lesions were planted."""
    failures: Sequence[CaseFailure] = ()
    """Failures, of which `group` is the row."""


def read_seed(seed: int, cases: Sequence[EvaluatedCase]) -> SeedFigures:
    """One training's figures over its test cases. Raises InputError for a file that is missing or damaged."""
    ordered = sorted(cases, key=lambda case: natural_order(case.case_id))
    evaluations = [CaseEvaluation.load(case.evaluated) for case in ordered]
    summary = summarise(evaluations)
    return SeedFigures(
        seed=seed,
        figures={key: getattr(summary, key) for key in FIGURES},
        cases=tuple(
            CaseFigures(
                case_id=case.case_id,
                micro_dice_2d=one.metrics.micro_dice_2d,
                dice_3d=one.metrics.dice_3d,
                voxel_auroc=one.metrics.voxel_auroc,
                slice_auroc=one.metrics.slice_auroc,
                true_lesions=one.metrics.true_lesions,
                found_lesions=one.metrics.found_lesions,
                false_positives=one.metrics.false_positives,
            )
            for case, one in zip(ordered, evaluations, strict=True)
        ),
    )


def read_seeds(seeds: Mapping[int, Sequence[EvaluatedCase]]) -> tuple[SeedFigures, ...]:
    """`read_seed` for each, seeds rising."""
    return tuple(read_seed(seed, seeds[seed]) for seed in sorted(seeds))


def over_seeds(seeds: Sequence[SeedFigures]) -> dict[str, Stat | None]:
    """Mean and sd (ddof = 1; none below two) of each figure over the seeds that define it."""
    return {key: statistic(value for one in seeds if (value := one.figures[key]) is not None) for key in FIGURES}
