"""Report of a liver run: `report.html` for people and `report.json` for programs, from one document.

Equal inputs give equal bytes. The report contains no paths and no patient data. Cases appear under their ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from medad.base.errors import CaseFailure
from medad.base.settings import MACHINE_FIELDS
from medad.base.storage import atomic_path, write_bytes
from medad.base.text import hide_paths, natural_order
from medad.cohort.samples import PHANTOM_NOTE
from medad.config.liver import LiverSettings
from medad.evaluation.metric_rows import METRICS, definitions
from medad.evaluation.metrics import CaseEvaluation, summarise
from medad.reporting.charts import svg_uri
from medad.reporting.failures import failure_rows
from medad.reporting.headline import headline_of
from medad.reporting.page import jpeg_uri, page_environment, settings_text
from medad.reports import pictures
from medad.reports.run.document import (
    INSERTED_GENERATED,
    INSERTED_REAL,
    INSERTED_STATEMENT,
    SCHEMA_VERSION,
    STATEMENT,
    CaseReport,
    Curve,
    Inserted,
    Number,
    ReportDocument,
    read_case,
    read_curve,
)
from medad.reports.run.shown_slices import PictureRow, picture_rows, slice_caption
from medad.steps.results import CaseResult

__all__ = ["render_html", "write_report"]

LESION_ROWS = 20
"""Most lesions per case in the HTML. The JSON contains all."""
PANELS = ((12, (224, 85)), (40, (176, 80)), (90, (128, 60)), (math.inf, (112, 55)))
"""Side of a panel and JPEG quality by the most cases. A page with 130 cases of three rows has less than 5 MB."""


def write_report(
    out: Path,
    *,
    settings: LiverSettings,
    results: Sequence[CaseResult[Path]],
    failures: Sequence[CaseFailure],
    restoration: Path | None,
    segmentation: Path | None,
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Write report.html and report.json into an existing folder, and preview.png if a case succeeded.

    Parameters
    ----------
    settings
        Settings of the run. Paths in them are left out.
    results, failures
        Cases in any order. The report sorts them by id. Both may be empty.
    restoration, segmentation
        Folders of the trained networks. Those without a curve.json show no curve. None: the run has no model.
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
    ordered = sorted(results, key=lambda result: natural_order(result.case_id))
    panel_px, quality = next(look for most, look in PANELS if len(ordered) <= most)
    cases, evaluations, uris = [], [], []
    for result in ordered:
        evaluation = None if result.evaluated is None else CaseEvaluation.load(result.evaluated)
        rows = picture_rows(result, panel_px)
        cases.append(read_case(result, evaluation, [row.shown for row in rows]))
        evaluations.extend([evaluation] if evaluation else [])
        uris.append([jpeg_uri(row.picture, quality) for row in rows])
    inserted = settings.test_data.insert is not None or any(case.inserted for case in cases)
    tag = INSERTED_GENERATED if PHANTOM_NOTE in notes else INSERTED_REAL
    summary = summarise(evaluations) if evaluations else None
    document = ReportDocument(
        schema_version=SCHEMA_VERSION,
        kind="adflows liver report",
        name=settings.name,
        statement=STATEMENT,
        inserted=Inserted(
            any=inserted,
            tag=tag if inserted else None,
            statement=f"{tag[0].upper()}{tag[1:]}. {INSERTED_STATEMENT}" if inserted else None,
            cases=tuple(case.case_id for case in cases if case.inserted),
        ),
        notes=tuple(hide_paths(note) for note in notes),
        headline=() if summary is None else headline_of(METRICS.values(), lambda metric: metric.value(summary)),
        summary=summary,
        definitions=definitions(settings.evaluation),
        cases=tuple(cases),
        failures=failure_rows(failures, hide_files=settings.test_data.pseudonyms or settings.train_data.pseudonyms),
        # networks trained together have the same curve in both folders
        curves=tuple(dict.fromkeys(map(read_curve, _with_curve(restoration, segmentation)))),
        settings=settings.public(*MACHINE_FIELDS),
        versions={name: hide_paths(versions[name]) for name in sorted(versions)},
    )
    write_bytes(out / "report.json", (document.model_dump_json(indent=1) + "\n").encode())
    write_bytes(out / "report.html", render_html(document, uris, pictures.row_width_px(panel_px)).encode())
    if (number := _median_case(cases)) is not None:
        _write_preview(out / "preview.png", cases[number], picture_rows(ordered[number], panel_px), tag)


def _with_curve(*folders: Path | None) -> list[Path]:
    """Return the folders that contain a training curve. A network from the package has none."""
    return [folder for folder in folders if folder is not None and (folder / "curve.json").is_file()]


def render_html(document: ReportDocument, row_uris: Sequence[Sequence[str]], row_width_px: int) -> str:
    """Return the document as one self-contained page. `row_uris` has a picture for each shown slice of each case."""
    environment = page_environment("medad.reports.run")
    environment.filters.update(
        figure=_number, volume=_volume, duration=_duration, numbers=_numbers, heading=_heading, caption=slice_caption
    )
    curves = [(_curve_title(curve), curve.steps, curve.loss) for curve in document.curves]
    return environment.get_template("report_template.html").render(
        doc=document,
        metrics=METRICS,
        row_uris=row_uris,
        row_width_px=row_width_px,
        colour_bar=pictures.colour_bar_uri(),
        difference_limit=pictures.DIFFERENCE_LIMIT,
        curves_uri=svg_uri(pictures.curves_svg(curves)) if curves else None,
        settings_yaml=settings_text(document.settings),
        lesion_rows=LESION_ROWS,
    )


def _curve_title(curve: Curve) -> str:
    loss = {"l1": "L1", "l2_ssim": "L2 + SSIM"}.get(curve.restoration_loss, curve.restoration_loss)
    names = {
        "restoration": f"Phase one: restoration, {loss} loss",
        "segmentation": "Phase two: segmentation, focal loss",
        "joint": f"Both networks jointly, {loss} + focal loss",
    }
    return f"{names.get(curve.phase, curve.phase)}, {curve.epochs} epoch{'' if curve.epochs == 1 else 's'}"


def _median_case(cases: Sequence[CaseReport]) -> int | None:
    """Return the number of the case with the median 3-D Dice, without ground truth of the first case. None: no case."""
    drawable = [number for number, case in enumerate(cases) if case.shown_slices]
    measured = [(metrics.dice_3d, number) for number in drawable if (metrics := cases[number].metrics)]
    measured.sort(reverse=True)
    return measured[len(measured) // 2][1] if measured else next(iter(drawable), None)


def _write_preview(path: Path, case: CaseReport, rows: Sequence[PictureRow], tag: str) -> None:
    """Write the pictures of a case as one picture with headings and captions."""
    kind = f" ({tag})" if case.inserted else ""
    picture = pictures.stack_rows(
        [(f"{case.case_id}: {slice_caption(row.shown)}{kind}", row.picture) for row in rows],
        [
            "slice (R left, A top)",
            "restoration",
            "|difference|",
            "probability 0 to 1",
            "orange: prediction" + (f"; blue: {'inserted' if case.inserted else 'label'}" if case.metrics else ""),
        ],
    )
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def _number(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _volume(mm3: float) -> str:
    return f"{mm3 / 1000:.1f} mL" if mm3 >= 1000 else f"{mm3:.0f} mm³" if mm3 >= 10 else f"{mm3:.1f} mm³"


def _numbers(value: Number | list[Number]) -> str:
    if isinstance(value, list):
        return ", ".join(_numbers(part) for part in value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _heading(key: str) -> str:
    if key in METRICS:
        return METRICS[key].heading
    units = {"mm": ", mm", "mm3": ", mm³", "hu": ", HU"}
    text = " ".join(units.get(word, word) for word in key.split("_")).replace(" ,", ",")
    return text[0].upper() + text[1:]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
