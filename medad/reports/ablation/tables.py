"""Tables of an ablation for programs and papers: CSV rows, and LaTeX in booktabs style."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medad.config.ablation import PublishedFigures
from medad.reporting.results_table import booktabs, latex_figure, latex_percent, stat_columns
from medad.reporting.tables import latex_escaped
from medad.reports.ablation.document import FIGURES, FRACTIONS, AblationDocument, CaseFigures, RowReport

LATEX_FIGURES = ("micro_dice_2d", "dice_3d_mean", "voxel_auroc_mean", "slice_auroc")
_LATEX_HEADS = tuple(FIGURES[key] for key in LATEX_FIGURES)
_ORDER = (*FRACTIONS, *(key for key in FIGURES if key not in FRACTIONS))
"""Order of the metrics in CSV tables."""


def grouped_rows(document: AblationDocument) -> Iterator[tuple[str, RowReport]]:
    """Yield every row with its group: `rows`, `baseline`, then the name of each sweep."""
    yield from (("rows", row) for row in document.rows)
    if document.baseline is not None:
        yield "baseline", document.baseline.row
    for sweep in document.sweeps:
        yield from ((sweep.name, row) for row in sweep.rows)


def summary_rows(document: AblationDocument) -> Iterator[dict[str, Any]]:
    """Yield summary.csv: one line per table row, with mean, sd and number of seeds per metric, and published values."""
    for group, row in grouped_rows(document):
        yield {
            "group": group,
            "row": row.name,
            "label": row.label,
            **stat_columns(row.stats, _ORDER, "n"),
            **_published_columns(row.published),
        }
    nothing = stat_columns({}, _ORDER, "n")
    for published in document.published_rows:
        yield {"group": "published", "row": "", "label": published.label, **nothing, **_published_columns(published)}


def seed_rows(document: AblationDocument) -> Iterator[dict[str, Any]]:
    """Yield seeds.csv: one line per row and seed. The seed is empty if the row does not depend on it."""
    for group, row in grouped_rows(document):
        for one in row.seeds:
            yield {"group": group, "row": row.name, "seed": one.seed if row.seeded else None, **one.figures}


def case_rows(document: AblationDocument) -> Iterator[dict[str, Any]]:
    """Yield cases.csv: one line per row, seed and test case."""
    for group, row in grouped_rows(document):
        for one in row.seeds:
            for case in one.cases:
                values = case.model_dump(include=set(CaseFigures.model_fields))
                yield {"group": group, "row": row.name, "seed": one.seed if row.seeded else None, **values}


def paired_rows(document: AblationDocument) -> Iterator[dict[str, Any]]:
    """Yield paired.csv: one line per metric, way of pairing, and pair of rows."""
    for table in document.paired:
        for pair in table.pairs:
            yield {"figure": table.figure, "paired_by": table.paired_by, **pair.model_dump()}


def curve_rows(document: AblationDocument) -> Iterator[dict[str, Any]]:
    """Yield curve.csv: one line per number of epochs of phase two."""
    for point in document.curve.points if document.curve else ():
        yield {"epochs": point.epochs, **stat_columns(point.stats, _ORDER, "n")}


def latex_table(document: AblationDocument) -> str:
    """Return the rows as a LaTeX table (package booktabs), in percent. Published values are below a rule."""
    published = [(row.label, row.published) for row in document.rows if row.published is not None]
    published += [(row.label, row) for row in document.published_rows]
    ours = list(document.rows) + ([document.baseline.row] if document.baseline else [])
    caption = f"{latex_escaped(document.name)}: test results in percent, {_caption_end(document)}."
    heads = ("Row", *_LATEX_HEADS)
    return booktabs(caption, heads, list(map(_latex_row, ours)), [_latex_published(*one) for one in published])


def latex_sweep(document: AblationDocument, name: str) -> str:
    """Return one sweep as a LaTeX table. Published values are below a rule."""
    sweep = next(one for one in document.sweeps if one.name == name)
    printed = [_latex_published(row.label, row.published) for row in sweep.rows if row.published is not None]
    caption = f"{latex_escaped(sweep.label)}: test results in percent, {_caption_end(document)}."
    heads = (latex_escaped(sweep.label), *_LATEX_HEADS)
    return booktabs(caption, heads, list(map(_latex_row, sweep.rows)), printed)


def _caption_end(document: AblationDocument) -> str:
    count = len(document.seeds)
    seeds = f"{count} seed{'' if count == 1 else 's'}"
    return f"mean $\\pm$ standard deviation over {seeds}. Values below the rule are published ones"


def _latex_row(row: RowReport) -> str:
    cells = (latex_percent(row.stats[key]) for key in LATEX_FIGURES)
    return f"{latex_escaped(row.label)} & {' & '.join(cells)} \\\\"


def _latex_published(label: str, row: PublishedFigures) -> str:
    dice, auroc = (row.dice_percent, row.dice_sd), (row.auroc_percent, row.auroc_sd)
    cells = (latex_figure(*dice, 2), "--", "--", latex_figure(*auroc, 2))
    return rf"\textit{{{latex_escaped(label)}}} (published: {latex_escaped(row.source)}) & {' & '.join(cells)} \\"


def _published_columns(row: PublishedFigures | None) -> dict[str, Any]:
    return {f"published_{key}": None if row is None else getattr(row, key) for key in PublishedFigures.model_fields}
