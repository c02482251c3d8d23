"""Report of an ablation: `report.html` for people, `report.json`, CSV and LaTeX tables, from one document.

Equal inputs give equal bytes. The report contains no paths and no patient data. Cases appear under their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medad.base.storage import write_bytes
from medad.config.ablation import ROWS, AblationSettings, PublishedFigures
from medad.evaluation.metric_rows import METRICS
from medad.reporting.charts import svg_uri
from medad.reporting.page import jpeg_uri, page_environment, settings_text
from medad.reporting.paired_tests import SIGNIFICANT, p_text
from medad.reporting.seed_statistics import Stat, percent, percentage_points
from medad.reporting.tables import write_csv
from medad.reports.ablation.charts import ChartPanel, PublishedValue, dots_png, dots_svg, embedding_svg, lines_svg
from medad.reports.ablation.document import FRACTIONS, AblationDocument, RowReport, SweepReport
from medad.reports.ablation.panels import example_panels, test_panels
from medad.reports.ablation.summary import make_document
from medad.reports.ablation.tables import (
    case_rows,
    curve_rows,
    latex_sweep,
    latex_table,
    paired_rows,
    seed_rows,
    summary_rows,
)
from medad.steps.results import AblationResults

CHARTED_FIGURES = ("micro_dice_2d", "dice_3d_mean", "voxel_auroc_mean", "slice_auroc")
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """Picture of a row as a data URI."""

    row: str
    uri: str


@dataclass(frozen=True)
class Pictures:
    """All pictures of the page."""

    slices: Sequence[tuple[str, Sequence[Picture]]]
    """Title of each test slice with its picture for each row."""
    examples: Sequence[Picture]
    """One picture per row: slices as clean, synthesised, mask, restored, difference, one below the other."""


def write_ablation_report(
    out: Path,
    *,
    settings: AblationSettings,
    results: AblationResults[Path],
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Write report.html, report.json and the CSV and LaTeX tables, and preview.png if a row has results.

    summary.csv has one line per table row. seeds.csv has one line per training, and cases.csv one per training and
    case. paired.csv has one line per test, and curve.csv one per number of epochs of phase two. table.tex and
    table_SWEEP.tex are for papers.

    Parameters
    ----------
    out
        An existing folder.
    settings
        Settings of the run. Folders and file names in them are left out.
    results
        Results in any order. The tables have the order of the settings.
    versions
        Version of each program and library that computed the results.
    notes
        Sentences to show near the top.

    Raises
    ------
    InputError
        A result's file is missing or damaged.
    DiskFullError
        The disk is full. Earlier reports stay complete.
    """
    document = make_document(settings, results, versions=versions, notes=notes)
    write_bytes(out / "report.json", (document.model_dump_json(indent=1) + "\n").encode())
    write_bytes(out / "report.html", render_html(document, _pictures(settings, results)).encode())
    write_csv(out / "summary.csv", summary_rows(document))
    write_csv(out / "seeds.csv", seed_rows(document))
    write_csv(out / "cases.csv", case_rows(document))
    write_csv(out / "paired.csv", paired_rows(document))
    write_csv(out / "curve.csv", curve_rows(document))
    write_bytes(out / "table.tex", latex_table(document).encode())
    for sweep in document.sweeps:
        write_bytes(out / f"table_{sweep.name}.tex", latex_sweep(document, sweep.name).encode())
    rows = _charted_rows(document)
    if any(row.seeds for row in rows):
        kind = f" ({document.inserted.tag})" if document.inserted.any else ""
        write_bytes(out / "preview.png", dots_png(document.name + kind, *_dots(rows)))


def render_html(document: AblationDocument, shown: Pictures) -> str:
    """Return the document as one self-contained page."""
    environment = page_environment("medad.reports.ablation")
    environment.filters.update(
        percent=percent,
        figure=_figure,
        published=_published,
        percentage_points=percentage_points,
        p=p_text,
        heading=_heading,
        changes=_changes,
        wrapped=_wrapped_title,
    )
    rows = _charted_rows(document)
    labels = {row.name: row.label for row in document.rows}
    return environment.get_template("ablation_template.html").render(
        doc=document,
        labels=labels,
        fractions=FRACTIONS,
        significant=SIGNIFICANT,
        dots_uri=svg_uri(dots_svg(*_dots(rows))) if any(row.seeds for row in rows) else None,
        sweep_uris={sweep.name: _sweep_chart(sweep) for sweep in document.sweeps},
        curve_uri=_curve_chart(document),
        embedding_uri=svg_uri(embedding_svg(document.embedding)) if document.embedding else None,
        shown=shown,
        settings_yaml=settings_text(document.settings),
    )


def _pictures(settings: AblationSettings, results: AblationResults[Path]) -> Pictures:
    by_name = {one.name: one for one in results.variants if one.group == ROWS}
    rows = [by_name[row.name] for row in settings.selected_rows if row.name in by_name]
    return Pictures(
        slices=[
            (slice_.title, [Picture(one.row, jpeg_uri(one.picture, JPEG_QUALITY)) for one in slice_.rows])
            for slice_ in test_panels(rows, settings.panels)
        ],
        examples=[
            Picture(one.row, jpeg_uri(one.picture, JPEG_QUALITY)) for one in example_panels(rows, settings.panels)
        ],
    )


def _charted_rows(document: AblationDocument) -> list[RowReport]:
    return [*document.rows, *([document.baseline.row] if document.baseline else [])]


def _dots(rows: Sequence[RowReport]) -> tuple[list[str], list[ChartPanel]]:
    panels = [
        ChartPanel(title, [row.stats[key] for row in rows], [_published_value(row.published, key) for row in rows])
        for key, title in _chart_titles().items()
    ]
    return [row.label for row in rows], panels


def _chart_titles() -> dict[str, str]:
    names = {"micro_dice_2d": "micro 2-D Dice", "dice_3d_mean": "3-D Dice", "voxel_auroc_mean": "voxel AUROC"}
    return {key: names.get(key, "slice AUROC") for key in CHARTED_FIGURES}


def _published_value(published: PublishedFigures | None, key: str) -> PublishedValue | None:
    """Return a published value. The papers' Dice is over all pixels of all slices, their AUROC is over slices."""
    if published is None:
        return None
    mean, sd = {
        "micro_dice_2d": (published.dice_percent, published.dice_sd),
        "slice_auroc": (published.auroc_percent, published.auroc_sd),
    }.get(key, (None, None))
    return None if mean is None else PublishedValue(mean, sd)


def _sweep_chart(sweep: SweepReport) -> str | None:
    """Return the chart of a sweep. None: its values are not numbers, or it has no results."""
    try:
        x = [float(row.name) for row in sweep.rows]
    except ValueError:
        return None
    panels = [
        ChartPanel(
            title, [row.stats[key] for row in sweep.rows], [_published_value(row.published, key) for row in sweep.rows]
        )
        for key, title in _chart_titles().items()
    ]
    if not any(stat for panel in panels for stat in panel.stats):
        return None
    return svg_uri(lines_svg(x, panels, sweep.label))


def _curve_chart(document: AblationDocument) -> str | None:
    if document.curve is None:
        return None
    x = [float(point.epochs) for point in document.curve.points]
    panels = [
        ChartPanel(title, [point.stats[key] for point in document.curve.points])
        for key, title in _chart_titles().items()
    ]
    return svg_uri(lines_svg(x, panels, "epochs of phase two"))


def _figure(stat: Stat | None) -> str:
    if stat is None:
        return "–"
    return f"{stat.mean:.1f}" + ("" if stat.sd is None else f" ± {stat.sd:.1f}")


def _published(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}")


def _wrapped_title(title: str) -> str:
    """Return a column title on several short lines."""
    for word in ("mean over cases", "in the liver", "per case", "Dice", "AUROC", "sensitivity"):
        title = title.replace(f" {word}", f"\n{word}")
    return title


def _changes(changes: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in changes.items()) or "base settings, unchanged"


def _heading(key: str) -> str:
    if key in METRICS:
        return METRICS[key].heading
    text = key.replace("_", " ").replace("hu ", "HU ").replace(" t test", " t-test")
    return text[0].upper() + text[1:]
