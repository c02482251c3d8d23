"""Means over seeds and categories of a comparison's rows, with ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from medad.reporting.results_table import ResultsTable, rank_stats
from medad.reporting.seed_statistics import Stat
from zsad.evaluation.metric_rows import METRICS
from zsad.reports.compare.document import MacroFigures, SystemCategory
from zsad.reports.run.document import SeedFigures
from zsad.reports.run.figures import macro_mean


def macro_figures(tables: Sequence[Mapping[str, Mapping[int, SeedFigures]]]) -> list[MacroFigures]:
    """Return the macro means of several rows, with ranks. Each row maps category and seed to figures."""
    found: list[dict[str, tuple[Stat | None, int]]] = []
    for table in tables:
        row_means = {}
        for key in METRICS:
            rows = [
                {seed: value for seed, one in seeds.items() if (value := one.metrics.get(key)) is not None}
                for seeds in table.values()
            ]
            row_means[key] = macro_mean(rows)
        found.append(row_means)
    complete = {}
    for key in METRICS:
        # all systems get the same images and masks: if only some systems lack a metric, they failed on the category
        known = {
            name
            for table in tables
            for name, seeds in table.items()
            if any(one.metrics.get(key) is not None for one in seeds.values())
        }
        complete[key] = [row_means[key][1] == len(known) for row_means in found]
    placed = {
        key: rank_stats(
            [row_means[key][0] if has_all else None for row_means, has_all in zip(found, complete[key], strict=True)],
            metric,
        )
        for key, metric in METRICS.items()
    }
    return [
        MacroFigures(
            metrics={key: stat for key, (stat, _) in row_means.items()},
            ranks={key: placed[key][number] for key in METRICS},
            categories={key: count for key, (_, count) in row_means.items()},
            complete={key: complete[key][number] for key in METRICS},
        )
        for number, row_means in enumerate(found)
    ]


def figures_by_category(
    names: Iterable[str], figures: Sequence[Mapping[str, Mapping[int, SeedFigures]]]
) -> list[dict[str, SystemCategory]]:
    """Return for each system its figures by category, with ranks within each category, without failed categories."""
    reports: list[dict[str, SystemCategory]] = [{} for _ in figures]
    for name in names:
        seeds = {str(number): row[name] for number, row in enumerate(figures)}
        values = {row: {seed: one.metrics for seed, one in found.items()} for row, found in seeds.items()}
        table = ResultsTable(tuple(METRICS.values()), values)
        stats = table.stats()
        ranks = table.ranks(stats)
        for report, (row, found) in zip(reports, seeds.items(), strict=True):
            if found:
                report[name] = SystemCategory(metrics=stats[row], ranks=ranks[row], seeds=dict(found))
    return reports
