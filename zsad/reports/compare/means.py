"""Means over seeds and categories of a comparison's rows, with ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from medad.reporting.seed_statistics import Stat, mean_and_sd
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
        key: ranks(
            [row_means[key][0] if has_all else None for row_means, has_all in zip(found, complete[key], strict=True)]
        )
        for key in METRICS
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
        metrics = [
            {key: mean_and_sd(one.metrics.get(key) for one in row_means[name].values()) for key in METRICS}
            for row_means in figures
        ]
        placed = {key: ranks([row_means[key] for row_means in metrics]) for key in METRICS}
        for number, row_means in enumerate(figures):
            if row_means[name]:
                reports[number][name] = SystemCategory(
                    metrics=metrics[number],
                    ranks={key: placed[key][number] for key in METRICS},
                    seeds=dict(row_means[name]),
                )
    return reports


def ranks(stats: Sequence[Stat | None]) -> list[int | None]:
    """Return the rank of each mean; 1 is the highest. Means equal in percent to one decimal have the same rank."""
    printed = [None if stat is None else round(100 * stat.mean, 1) for stat in stats]
    known = [value for value in printed if value is not None]
    return [None if value is None else 1 + sum(other > value for other in known) for value in printed]
