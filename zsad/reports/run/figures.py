"""Figures of a report: means over seeds and categories, and which images to show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from medad.base.text import natural_order
from medad.reporting.results_table import ResultsTable
from medad.reporting.seed_statistics import Stat, mean_and_sd
from zsad.evaluation.metric_rows import METRICS
from zsad.reports.run.document import (
    CategoryReport,
    Macro,
    Rank,
    SeedFigures,
    VariantFigures,
)


def variant_figures(variant: str, seeds: Mapping[int, SeedFigures]) -> VariantFigures:
    """Return the figures of a variant, with means over seeds."""
    ordered = {seed: seeds[seed] for seed in sorted(seeds)}
    seed_values = list(ordered.values())
    table = ResultsTable(tuple(METRICS.values()), {variant: {seed: one.metrics for seed, one in ordered.items()}})
    return VariantFigures(
        variant=variant,
        seeds=ordered,
        metrics=table.stats()[variant],
        deployable_threshold=mean_and_sd(one.deployable_threshold for one in seed_values),
        deployable_f1=mean_and_sd(one.deployable_f1 for one in seed_values),
        flagged=mean_and_sd(one.flagged for one in seed_values),
        found=mean_and_sd(one.found for one in seed_values),
        false_alarms=mean_and_sd(one.false_alarms for one in seed_values),
    )


def macro_means(categories: Sequence[CategoryReport], variants: Sequence[str]) -> tuple[Macro, ...]:
    """Return the mean over categories of each metric for each seed, then its mean and sd over the seeds.

    A category without the metric is left out. Only seeds that all other categories have are used.
    """
    macros = []
    for variant in variants:
        tables = [one for category in categories for one in category.variants if one.variant == variant]
        metrics: dict[str, Stat | None] = {}
        counts: dict[str, int] = {}
        for key in METRICS:
            rows = [
                {seed: value for seed, one in table.seeds.items() if (value := one.metrics.get(key)) is not None}
                for table in tables
            ]
            metrics[key], counts[key] = macro_mean(rows)
        f1, _ = macro_mean(
            [
                {seed: one.deployable_f1 for seed, one in table.seeds.items() if one.deployable_f1 is not None}
                for table in tables
            ]
        )
        macros.append(Macro(variant=variant, metrics=metrics, categories=counts, deployable_f1=f1))
    return tuple(macros) if any(stat for macro in macros for stat in macro.metrics.values()) else ()


def macro_mean(rows: Sequence[Mapping[int, float]]) -> tuple[Stat | None, int]:
    """Return the mean of one metric over categories for each seed, then over seeds, and the number of categories.

    Parameters
    ----------
    rows
        One mapping per category, from seed to metric. A category with an empty mapping is left out. Only seeds that
        all other categories have are used.
    """
    defined = [row for row in rows if row]
    seeds = sorted(set.intersection(*(set(row) for row in defined))) if defined else []
    return mean_and_sd(statistics.fmean(row[seed] for row in defined) for seed in seeds), len(defined)


def pick_images(
    ids: Sequence[str], scores: Sequence[float], anomalous: Sequence[bool | None], misses: int
) -> list[tuple[Rank, int]]:
    """Return the images to show as (rank, index), each image once.

    With labels, these are the highest-scored anomalous image, the median anomalous and the median normal image, the
    `misses` lowest-scored anomalous and the `misses` highest-scored normal images. Without labels, these are the
    2 x `misses` highest-scored images, the median and the lowest. Equal scores are ordered by id.
    """
    rising = sorted(range(len(ids)), key=lambda i: (scores[i], natural_order(ids[i])))
    bad, good = [i for i in rising if anomalous[i]], [i for i in rising if anomalous[i] is False]
    wanted: list[tuple[Rank, int]] = []
    if bad or good:
        wanted += [("highest anomalous", i) for i in bad[-1:]]
        wanted += [("median anomalous", bad[len(bad) // 2])] if bad else []
        wanted += [("lowest anomalous", i) for i in bad[:misses]]
        wanted += [("highest normal", i) for i in good[::-1][:misses]]
        wanted += [("median normal", good[len(good) // 2])] if good else []
    elif rising:
        wanted += [("highest", i) for i in rising[::-1][: 2 * misses]]
        wanted += [("median", rising[len(rising) // 2]), ("lowest", rising[0])]
    first: dict[int, Rank] = {}
    for rank, i in wanted:
        first.setdefault(i, rank)
    return [(rank, i) for i, rank in first.items()]
