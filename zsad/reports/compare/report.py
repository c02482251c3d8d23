"""Report of a comparison: `report.html` for people, `report.json`, CSV and LaTeX tables, all from one document.

Equal inputs give equal bytes. The report contains no path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medad.base.errors import CaseFailure
from medad.base.storage import write_bytes
from medad.reporting.page import settings_text
from medad.reporting.paired_tests import SIGNIFICANT, p_text
from medad.reporting.seed_statistics import percentage_points
from medad.reporting.tables import write_csv
from zsad.config.settings import ZsadSettings
from zsad.evaluation.metric_rows import PRO_200
from zsad.reports.compare.charts import Dots, Panel, line_chart, overview_png
from zsad.reports.compare.data import (
    load_system,
)
from zsad.reports.compare.document import (
    AblationReport,
    CompareDocument,
    MacroFigures,
    PairedResult,
    PairedTable,
    SystemReport,
)
from zsad.reports.compare.summary import make_document
from zsad.reports.compare.tables import ablation_rows, latex_table, paired_rows, score_rows, summary_rows, system_rows
from zsad.reports.page import page_environment, published_figure
from zsad.reports.published import CategoryFigures
from zsad.steps.results import AblationResult, SystemResult

__all__ = [
    "write_compare_report",
]


def write_compare_report(
    out: Path,
    *,
    settings: ZsadSettings,
    systems: Sequence[SystemResult[Path]],
    ablations: Sequence[AblationResult[Path]] = (),
    failures: Sequence[CaseFailure] = (),
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Write report.html, report.json, five CSV tables and two LaTeX tables. If a system has figures, write preview.png.

    - systems.csv: one row per system, category and seed
    - scores.csv: one row per image, system and seed
    - summary.csv: one row per system
    - paired.csv: one row per test and pair of systems
    - ablations.csv: one row per row of an ablation
    - table_image.tex, table_pixel.tex: tables for papers

    Parameters
    ----------
    out
        An existing folder.
    settings
        Settings of the run. Paths in them are left out of the report.
    systems
        Results in the order of the tables. Their names, `system.shown`, differ. May be empty.
    ablations
        Results of ablations; some that the settings name may be missing.
    failures
        Failures in any order. `group` is the name of the system in the tables.
    versions
        Versions of the programs that computed the results, by name.
    notes
        Sentences to show near the top.

    Raises
    ------
    InputError
        A file of a result is missing or damaged.
    DiskFullError
        The disk is full. Earlier reports are unchanged.
    """
    loaded = [load_system(one) for one in systems]
    document = make_document(settings, loaded, ablations, failures, versions, notes)
    write_bytes(out / "report.json", (document.model_dump_json(indent=1) + "\n").encode())
    write_bytes(out / "report.html", render_html(document).encode())
    write_csv(out / "systems.csv", system_rows(document, loaded))
    write_csv(out / "scores.csv", score_rows(loaded))
    write_csv(out / "summary.csv", summary_rows(document))
    write_csv(out / "paired.csv", paired_rows(document))
    write_csv(out / "ablations.csv", ablation_rows(document))
    for of in ("image", "pixel"):
        write_bytes(out / f"table_{of}.tex", latex_table(document, of).encode())
    if any(stat for one in document.systems for stat in one.mean.metrics.values()):
        write_bytes(out / "preview.png", _preview(document))


def render_html(document: CompareDocument) -> str:
    """Render the document as one self-contained page."""
    environment = page_environment("zsad.reports.compare")
    environment.filters.update(duration=_duration, bytes=_bytes, p=_p_text, points=percentage_points)
    return environment.get_template("compare_template.html").render(
        doc=document,
        remarks={one.name: _remarks(one, document) for one in document.systems},
        matrices=[_matrix(table, document) for table in document.paired],
        charts=[_chart(one, _pro_key(document)) for one in document.ablations],
        published_of_category=lambda name: _published_of_category(document, name),
        settings_yaml=settings_text(document.settings),
    )


@dataclass(frozen=True)
class _Cell:
    """One pair in a matrix: the figure of the row minus that of the column."""

    pair: PairedResult
    difference: float | None

    @property
    def significant(self) -> bool:
        return self.pair.p_holm is not None and self.pair.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class _Matrix:
    """Matrix of all pairs of one test. Cells on the diagonal are None."""

    table: PairedTable
    title: str
    rows: Sequence[tuple[str, Sequence[_Cell | None]]]
    tested: int
    reasons: Sequence[str]
    """Reasons why some pairs were not tested."""


def _matrix(table: PairedTable, document: CompareDocument) -> _Matrix:
    names = [one.name for one in document.systems]
    cells: dict[tuple[str, str], _Cell] = {}
    for pair in table.pairs:
        difference = pair.difference
        cells[pair.a, pair.b] = _Cell(pair, difference)
        cells[pair.b, pair.a] = _Cell(pair, None if difference is None else -difference)
    return _Matrix(
        table=table,
        title=document.metrics[table.metric],
        rows=[(row, [cells.get((row, column)) for column in names]) for row in names],
        tested=sum(pair.p is not None for pair in table.pairs),
        reasons=list(dict.fromkeys(pair.reason for pair in table.pairs if pair.reason)),
    )


def _remarks(one: SystemReport, document: CompareDocument) -> list[str]:
    """Return remarks that a reader needs to understand a system's row."""
    remarks = []
    lacking = [category.name for category in document.categories if category.name not in one.categories]
    if lacking:
        remarks.append(f"failed on {', '.join(lacking)}: its means leave out these categories and are not ranked")
    if not one.seeded:
        remarks.append("does not depend on the seed, so it has one value and no deviation")
    elif (seeds := _fewest_seeds(one.mean)) < len(document.seeds):
        remarks.append(f"mean over {seeds} of {len(document.seeds)} seeds")
    if one.trained:
        remarks.append("was trained on labelled auxiliary images, its encoder was not")
    return remarks


def _fewest_seeds(mean: MacroFigures) -> int:
    return min((stat.n for stat in mean.metrics.values() if stat is not None), default=0)


def _published_of_category(document: CompareDocument, name: str) -> list[tuple[str, str, dict[str, str]]]:
    """Return the published figures of one category: system, source, and figure by metric."""
    rows: dict[str, list[CategoryFigures]] = {}
    for one in document.published_by_category:
        if name in one.figures:
            rows.setdefault(one.system, []).append(one)
    return [
        (
            system,
            f"{found[0].paper}, {', '.join(one.table for one in found)}",
            {one.metric: f"{one.figures[name]:.1f}" for one in found},
        )
        for system, found in rows.items()
    ]


def _chart(ablation: AblationReport, pro: str) -> tuple[str, str] | None:
    """Return the chart of an ablation and its alternative text. Return None if it varies several numbers."""
    try:
        x = [float(row.label) for row in ablation.rows]
    except ValueError:
        return None
    panels, words = [], []
    for key, title in (("image_auroc", "image AUROC"), ("pixel_auroc", "pixel AUROC"), (pro, "pixel PRO")):
        stats = [row.mean.metrics[key] for row in ablation.rows]
        printed = [
            next((published_figure(one, key, pro_200_shown=pro == PRO_200) for one in row.published), None)
            for row in ablation.rows
        ]
        if any(stats):
            panels.append(Panel(title, x, stats, printed))
            values = "; ".join(f"{100 * stat.mean:.1f} at {one:g}" for one, stat in zip(x, stats, strict=True) if stat)
            words.append(f"{title} in percent: {values}")
    if not panels:
        return None
    return line_chart(panels, ablation.varied), f"{ablation.title}. {'. '.join(words)}."


def _preview(document: CompareDocument) -> bytes:
    kinds = [notice.kind for notice in document.notices if notice.kind != "published"]
    title = document.name + (f" ({', '.join(kinds)})" if kinds else "")
    panels = [
        Dots(document.metrics[key], stats)
        for key in ("image_auroc", "pixel_auroc", _pro_key(document))
        if any(stats := [one.mean.metrics[key] for one in document.systems])
    ]
    counts = {one.name: len(one.categories) for one in document.systems}
    category_count = len(document.categories)
    names = [
        name if n == category_count else f"{name} ({n} of {category_count} categories)" for name, n in counts.items()
    ]
    return overview_png(title, names, panels)


def _pro_key(document: CompareDocument) -> str:
    """Return the key of the metric that corresponds to the papers' PRO."""
    return PRO_200 if PRO_200 in document.metrics else "pixel_aupro"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _bytes(count: int | float | None) -> str:
    if count is None:
        return "–"
    if not count:
        return "0 B"
    step = min(3, max(0, int(math.log(count, 1024))))
    return f"{count / 1024**step:.3g} {('B', 'KiB', 'MiB', 'GiB')[step]}"


def _p_text(value: float) -> str:
    return f"p {p_text(value)}"
