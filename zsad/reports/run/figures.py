"""Figures of a report: means over seeds and categories, and which images to show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from medad.base.text import natural_order
from medad.reporting.seed_statistics import Stat, mean_and_sd
from zsad.config.run import Variant
from zsad.reports.run.document import (
    METRICS,
    CategoryReport,
    Macro,
    Rank,
    SeedFigures,
    VariantFigures,
)


def variant_figures(variant: Variant, seeds: Mapping[int, SeedFigures]) -> VariantFigures:
    """Add means over seeds."""
    ordered = {seed: seeds[seed] for seed in sorted(seeds)}
    each = list(ordered.values())
    return VariantFigures(
        variant=variant,
        seeds=ordered,
        metrics={key: mean_and_sd(one.metrics.get(key) for one in each) for key in METRICS},
        deployable_threshold=mean_and_sd(one.deployable_threshold for one in each),
        deployable_f1=mean_and_sd(one.deployable_f1 for one in each),
        flagged=mean_and_sd(one.flagged for one in each),
        found=mean_and_sd(one.found for one in each),
        false_alarms=mean_and_sd(one.false_alarms for one in each),
    )


def macro_means(categories: Sequence[CategoryReport], variants: Sequence[Variant]) -> tuple[Macro, ...]:
    """The mean over categories of each figure, seed by seed, and then its mean and sd over the seeds.

    A category without the figure is left out. Only seeds count that all the others have.
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
    """Mean over categories of one figure, seed by seed, then over seeds; and how many categories it is of.

    Parameters
    ----------
    rows
        A category each: seed -> figure. Empty: the category has no such figure and is left out. Only seeds count that
        all the others have.
    """
    defined = [row for row in rows if row]
    seeds = sorted(set.intersection(*(set(row) for row in defined))) if defined else []
    return mean_and_sd(statistics.fmean(row[seed] for row in defined) for seed in seeds), len(defined)


def pick_images(
    ids: Sequence[str], scores: Sequence[float], anomalous: Sequence[bool | None], misses: int
) -> list[tuple[Rank, int]]:
    """Which images to show, each once, as (rank, index).

    With labels: the `misses` lowest-scored anomalous and the `misses` highest-scored normal images, the highest-scored
    anomalous one, and the median of either kind. Without: the 2 x `misses` highest, the median and the lowest. Equal
    scores go by id.
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
