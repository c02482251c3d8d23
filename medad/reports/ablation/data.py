"""Reading of an ablation's results for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medad.base.text import natural_order
from medad.evaluation.metric_rows import COLUMNS
from medad.evaluation.metrics import CaseEvaluation, summarise
from medad.reporting.results_table import ResultsTable
from medad.reporting.seed_statistics import Stat
from medad.reports.ablation.document import CaseFigures, SeedFigures
from medad.steps.results import CaseResult


def read_seed(seed: int, cases: Sequence[CaseResult[Path]]) -> SeedFigures:
    """Read the metrics of one training over its test cases. Raises InputError if a file is missing or damaged."""
    ordered = sorted(cases, key=lambda case: natural_order(case.case_id))
    evaluations = [CaseEvaluation.load(case.evaluated) for case in ordered if case.evaluated is not None]
    summary = summarise(evaluations)
    return SeedFigures(
        seed=seed,
        figures={key: metric.value(summary) for key, metric in COLUMNS.items()},
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


def read_seeds(seeds: Mapping[int, Sequence[CaseResult[Path]]]) -> tuple[SeedFigures, ...]:
    """Read the metrics of all seeds in ascending order."""
    return tuple(read_seed(seed, seeds[seed]) for seed in sorted(seeds))


def results_of(rows: Mapping[str, Sequence[SeedFigures]]) -> ResultsTable:
    """Return the table of rows. Seeds for which a metric is undefined are left out of its mean."""
    values = {row: {one.seed: one.figures for one in seeds} for row, seeds in rows.items()}
    return ResultsTable(tuple(COLUMNS.values()), values, undefined_seeds_count=False)


def mean_over_seeds(seeds: Sequence[SeedFigures]) -> dict[str, Stat | None]:
    """Return mean and sd (ddof = 1) of each metric over the seeds for which it is defined."""
    return results_of({"": seeds}).stats()[""]
