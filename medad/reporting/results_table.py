"""The table of rows x seeds x metrics of ablations and comparisons: means, ranks, paired tests, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from medad.base.metric import Metric
from medad.reporting.paired_tests import PairedOutcome, holm
from medad.reporting.seed_statistics import Stat, mean_and_sd

Row = TypeVar("Row")
Values = Mapping[str, float | None]
"""Values of one row and seed by the key of the metric. None: undefined."""


@dataclass(frozen=True)
class ResultsTable:
    """Results by row, seed and metric. A row without seeds has no result."""

    metrics: Sequence[Metric]
    rows: Mapping[str, Mapping[int, Values]]
    undefined_seeds_count: bool = True
    """True: a metric that is undefined for one seed has no mean. False: such seeds are left out of its mean."""

    def stats(self) -> dict[str, dict[str, Stat | None]]:
        """Return mean and sd over seeds by row and metric. None: undefined."""
        return {row: {each.key: self._stat(row, each.key) for each in self.metrics} for row in self.rows}

    def _stat(self, row: str, key: str) -> Stat | None:
        values: Iterable[float | None] = self.by_seed(row, key).values()
        return mean_and_sd(values if self.undefined_seeds_count else (v for v in values if v is not None))

    def ranks(self, stats: Mapping[str, Mapping[str, Stat | None]]) -> dict[str, dict[str, int | None]]:
        """Return the rank of each row by metric; see `rank_stats`. `stats` are those of this table."""
        places = {each.key: rank_stats([stats[row][each.key] for row in self.rows], each) for each in self.metrics}
        return {row: {key: found[number] for key, found in places.items()} for number, row in enumerate(self.rows)}

    def by_seed(self, row: str, key: str) -> dict[int, float | None]:
        """Return one metric of a row by seed."""
        return {seed: values.get(key) for seed, values in self.rows[row].items()}


def rank_stats(stats: Sequence[Stat | None], metric: Metric) -> list[int | None]:
    """Return the rank of each mean; 1 is the best. Means that are printed the same have the same rank."""
    sign, scale = (1 if metric.higher_is_better else -1), (100 if metric.fraction else 1)
    printed = [None if stat is None else sign * round(scale * stat.mean, 1) for stat in stats]
    known = [value for value in printed if value is not None]
    return [None if value is None else 1 + sum(other > value for other in known) for value in printed]


def corrected(
    tests: Sequence[tuple[Row, Row, PairedOutcome]],
) -> Iterator[tuple[Row, Row, PairedOutcome, float | None]]:
    """Yield each test of a table with its p-value after Holm's correction over all of them."""
    for (a, b, outcome), p in zip(tests, holm([outcome.p for *_, outcome in tests]), strict=True):
        yield a, b, outcome, p


def stat_columns(stats: Mapping[str, Stat | None], keys: Iterable[str], count: str) -> dict[str, float | None]:
    """Return the columns KEY_mean, KEY_sd and KEY_`count` (the number of seeds) of a CSV table."""
    columns: dict[str, float | None] = {}
    for key in keys:
        stat = stats.get(key)
        parts = (None, None, None) if stat is None else (stat.mean, stat.sd, stat.n)
        columns |= dict(zip((f"{key}_mean", f"{key}_sd", f"{key}_{count}"), parts, strict=True))
    return columns


def latex_figure(mean: float | None, sd: float | None, decimals: int = 1) -> str:
    """Return a cell with mean and sd. None as mean: a dash."""
    if mean is None:
        return "--"
    return f"${mean:.{decimals}f}" + ("$" if sd is None else rf" \pm {sd:.{decimals}f}$")


def latex_percent(stat: Stat | None) -> str:
    """Return a cell with a fraction's mean and sd in percent."""
    return "--" if stat is None else latex_figure(100 * stat.mean, None if stat.sd is None else 100 * stat.sd)


def booktabs(caption: str, heads: Sequence[str], ours: Sequence[str], printed: Sequence[str]) -> str:
    """Return a table of the package booktabs. Lines of published values (`printed`) follow below a rule."""
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(heads) - 1)}}}",
            r"\toprule",
            f"{' & '.join(heads)} \\\\",
            r"\midrule",
            *ours,
            *([r"\midrule", *printed] if printed else []),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
