"""Report of an inserted-lesion study: `report.html`, `report.json`, CSV and LaTeX, from one document.

Equal inputs give equal bytes. The report contains no paths and no patient data. Cases appear under their ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medad.base.errors import CaseFailure
from medad.base.storage import write_bytes
from medad.config.sensitivity import SensitivitySettings
from medad.evaluation.sensitivity import LesionFigures, Row, VolumeRecord
from medad.reporting.page import page_environment, settings_text
from medad.reporting.tables import latex_escaped, write_csv
from medad.reports.sensitivity.charts import heat_map_png, heat_map_uri, size_label
from medad.reports.sensitivity.document import SensitivityDocument, make_document, read_volumes
from medad.steps.results import VolumeResult

REPORT_FILES = (
    "report.html", "report.json", "lesions.csv", "sensitivity.csv", "sensitivity.tex", "preview.png",
)  # fmt: skip
_PLACES = {"inside": "inside", "rim": "at the rim"}


def write_sensitivity_report(
    out: Path,
    *,
    settings: SensitivitySettings,
    results: Sequence[VolumeResult[Path]],
    trained_on: frozenset[str] | None = frozenset(),
    failures: Sequence[CaseFailure] = (),
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
    show_file_names: bool = True,
) -> None:
    """Write `REPORT_FILES` into an existing folder. preview.png is written only if a lesion was inserted.

    lesions.csv has one row per inserted lesion. sensitivity.csv has one row per size, contrast and place, and rows
    pooled over them. sensitivity.tex is a table of sizes by contrasts for papers.

    Parameters
    ----------
    results, failures
        Results and failures in any order. Both may be empty.
    trained_on
        Cases on which the model was trained. The report then starts with a warning. None: not known.
    versions
        Version of each program and library that computed the results.
    notes
        Sentences to show near the top.
    show_file_names
        True: base names of files with errors may be shown.

    Raises
    ------
    InputError
        A record is missing or damaged.
    DiskFullError
        The disk is full. Earlier reports stay complete.
    """
    volumes = read_volumes(results)
    document = make_document(
        settings,
        volumes,
        trained_on=trained_on,
        failures=failures,
        versions=versions,
        notes=notes,
        show_file_names=show_file_names,
    )
    write_bytes(out / "report.json", (document.model_dump_json(indent=1) + "\n").encode())
    write_bytes(out / "report.html", render_html(document).encode())
    write_csv(out / "lesions.csv", _lesion_rows(volumes))
    write_csv(out / "sensitivity.csv", (_csv_row(row) for row in _all_rows(document)))
    write_bytes(out / "sensitivity.tex", latex_table(document).encode())
    if document.summary is not None and document.summary.inserted:
        write_bytes(out / "preview.png", heat_map_png(document.cells))


def render_html(document: SensitivityDocument) -> str:
    """Return the document as one self-contained page."""
    environment = page_environment("medad.reports.sensitivity")
    environment.filters.update(share=_share, rate=_rate, figure=_figure, title=_title)
    inserted = document.summary is not None and document.summary.inserted
    return environment.get_template("sensitivity_template.html").render(
        doc=document,
        heat_map=heat_map_uri(document.cells) if inserted else None,
        settings_yaml=settings_text(document.settings),
    )


def latex_table(document: SensitivityDocument) -> str:
    """Return a LaTeX table (package booktabs) of sensitivity in percent and found/inserted.

    It has one row per size and place, and one column per contrast.
    """
    contrasts = list(dict.fromkeys(row.contrast or "" for row in document.cells))
    lines = []
    for place in dict.fromkeys(row.place for row in document.cells):
        for size in dict.fromkeys(row.size_mm for row in document.cells):
            figures = [row.figures for row in document.cells if (row.place, row.size_mm) == (place, size)]
            head = f"{size_label(size).replace('–', '--')}, {_PLACES[place]}" if size and place else ""
            lines.append(" & ".join([head, *map(_latex_cell, figures)]) + r" \\")
    allowed_ml = document.settings["false_positive_ml"]
    warned = "".join(f" {latex_escaped(warning)}" for warning in document.warnings)
    caption = (
        f"{latex_escaped(document.name)}: sensitivity to inserted lesions in percent (found/inserted) at "
        f"{allowed_ml:g} mL of false positives per liver, by largest diameter and contrast.{warned}"
    )
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'c' * len(contrasts)}}}",
            r"\toprule",
            " & ".join(["Lesion", *(one.replace("−", "$-$") for one in contrasts)]) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_cell(figures: LesionFigures) -> str:
    if figures.sensitivity is None:
        return "--"
    return f"{100 * figures.sensitivity:.0f} ({figures.found}/{figures.inserted})"


def _all_rows(document: SensitivityDocument) -> list[Row]:
    return [*document.cells, *document.by_size, *document.by_contrast, *document.by_place]


def _csv_row(row: Row) -> dict[str, Any]:
    low, high = row.size_mm or (None, None)
    return {
        "size_from_mm": low,
        "size_to_mm": high,
        "contrast": row.contrast,
        "place": row.place,
        **row.figures.model_dump(),
    }


def _lesion_rows(volumes: Sequence[tuple[str, VolumeRecord]]) -> Iterable[dict[str, Any]]:
    for case_id, volume in volumes:
        for lesion in volume.lesions:
            yield {
                "case": case_id,
                "place": volume.place,
                "kind": volume.contrast.kind,
                "contrast": volume.contrast.label,
                "repeat": volume.repeat,
                "threshold": volume.threshold,
                **{key: int(value) if isinstance(value, bool) else value for key, value in lesion.model_dump().items()},
            }


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _rate(figures: LesionFigures) -> str:
    if figures.sensitivity is None or figures.low is None or figures.high is None:
        return "–"
    return f"{100 * figures.sensitivity:.0f} % ({100 * figures.low:.0f} to {100 * figures.high:.0f})"


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _title(row: Row) -> str:
    parts = [size_label(row.size_mm)] if row.size_mm else []
    parts += [row.contrast] if row.contrast else []
    parts += [_PLACES[row.place]] if row.place else []
    return ", ".join(parts) or "all lesions"
