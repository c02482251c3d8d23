"""The report of a run: `report.html` for people, `report.json` for programs, from one document.

Equal inputs give equal bytes. No path and no patient data goes in: cases appear under their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Bool
from PIL import Image

from medad.base.errors import CaseFailure, InputError
from medad.base.settings import MACHINE_FIELDS
from medad.base.storage import atomic_path, write_bytes
from medad.base.text import hide_paths, natural_order
from medad.cohort.samples import PHANTOM_NOTE
from medad.config.liver import LiverSettings
from medad.evaluation.metrics import CaseEvaluation, definitions, dice_of_counts, summarise
from medad.reporting.failures import shown_failures
from medad.reporting.page import jpeg_uri, page_environment
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
    Rank,
    ReportDocument,
    ShownSlice,
    read_case,
    read_curve,
    read_tensor,
)
from medad.slices.prepared_file import load_prepared
from medad.steps.results import CaseResult

__all__ = ["render_html", "write_report"]

LESION_ROWS = 20
"""Lesions of a case shown in the HTML; the JSON holds all."""


@dataclass(frozen=True)
class _Row:
    """A shown slice and its picture."""

    shown: ShownSlice
    picture: Image.Image


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
    """Write report.html, report.json and, where a case succeeded, preview.png into an existing folder.

    Parameters
    ----------
    settings
        The run's settings; paths in them are withheld.
    results, failures
        Cases in any order; the report sorts them by id. Both may be empty.
    restoration, segmentation
        Trained folders (curve.json), None where a phase was not trained here.
    versions
        Name -> version of what computed the results.
    notes
        Plain sentences to show near the top.

    Raises
    ------
    InputError
        A result's file is missing or damaged.
    DiskFullError
        No room to write; earlier reports stay whole.
    """
    ordered = sorted(results, key=lambda result: natural_order(result.case_id))
    # 130 cases of three rows each must stay a few megabytes
    panel_px, quality = (224, 85) if len(ordered) <= 12 else (176, 80) if len(ordered) <= 40 else (128, 60)
    cases, evaluations, pictured = [], [], []
    for result in ordered:
        evaluation = None if result.evaluated is None else CaseEvaluation.load(result.evaluated)
        rows = _rows(result, panel_px)
        cases.append(read_case(result, evaluation, [row.shown for row in rows]))
        evaluations.extend([evaluation] if evaluation else [])
        pictured.append(rows)
    inserted = settings.test_data.insert is not None or any(case.inserted for case in cases)
    tag = INSERTED_GENERATED if PHANTOM_NOTE in notes else INSERTED_REAL
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
        summary=summarise(evaluations) if evaluations else None,
        definitions=definitions(settings.evaluation),
        cases=tuple(cases),
        failures=shown_failures(failures, hidden=settings.test_data.pseudonyms or settings.train_data.pseudonyms),
        # networks trained together have one curve, in either's folder
        curves=tuple(dict.fromkeys(read_curve(each) for each in (restoration, segmentation) if each is not None)),
        settings=settings.public(*MACHINE_FIELDS),
        versions={name: hide_paths(versions[name]) for name in sorted(versions)},
    )
    write_bytes(out / "report.json", (document.model_dump_json(indent=1) + "\n").encode())
    uris = [[jpeg_uri(row.picture, quality) for row in rows] for rows in pictured]
    write_bytes(out / "report.html", render_html(document, uris, pictures.row_width_px(panel_px)).encode())
    _write_preview(out / "preview.png", cases, pictured, tag)


def render_html(document: ReportDocument, row_uris: Sequence[Sequence[str]], row_width_px: int) -> str:
    """The document as one self-contained page; `row_uris` holds a picture for each shown slice of each case."""
    environment = page_environment("medad.reports", "medad.reports.run")
    environment.filters.update(
        figure=_figure, volume=_volume, duration=_duration, numbers=_numbers, heading=_heading, caption=slice_caption
    )
    curves = [(_curve_title(curve), curve.steps, curve.loss) for curve in document.curves]
    return environment.get_template("report_template.html").render(
        doc=document,
        row_uris=row_uris,
        row_width_px=row_width_px,
        colour_bar=pictures.colour_bar_uri(),
        difference_limit=pictures.DIFFERENCE_LIMIT,
        curves_uri=pictures.svg_uri(pictures.curves_svg(curves)) if curves else None,
        settings_yaml=yaml.safe_dump(document.settings, sort_keys=False, default_flow_style=None, allow_unicode=True),
        lesion_rows=LESION_ROWS,
    )


def pick_slices(
    truth: Bool[np.ndarray, "N S S"] | None,
    prediction: Bool[np.ndarray, "N S S"],
    max_probability: Sequence[float],
) -> list[tuple[Rank, int]]:
    """Which slices to show, each once, as (rank, index).

    With truth: best, median and worst Dice among the slices where truth or prediction has a pixel; of equal Dice, more
    pixels in disagreement is worse. Without truth, or with nothing to compare: highest, median and lowest by predicted
    area, then by the largest probability.
    """
    ranks: tuple[Rank, Rank, Rank] = ("highest", "median", "lowest")
    order = sorted(range(len(prediction)), key=lambda i: (-np.count_nonzero(prediction[i]), -max_probability[i], i))
    if truth is not None:
        union = [np.count_nonzero(a | b) for a, b in zip(truth, prediction, strict=True)]
        compared = [i for i in order if union[i]]
        if compared:
            ranks = ("best", "median", "worst")
            order = sorted(compared, key=lambda i: (-(_slice_dice(truth[i], prediction[i]) or 0.0), union[i], i))
    if not order:
        return []
    places = {0: ranks[0], len(order) - 1: ranks[2], len(order) // 2: ranks[1]}
    if len(order) <= 2:
        places = {len(order) - 1: ranks[2], 0: ranks[0]}
    return [(places[place], order[place]) for place in sorted(places)]


def _rows(result: CaseResult[Path], panel_px: int) -> list[_Row]:
    """The shown slices of a case; only those are read from disk whole."""
    assert result.segmented is not None, "a finished case is segmented"
    path = result.segmented / "slices.safetensors"
    truth = None
    if result.evaluated is not None:
        truth = read_tensor(result.evaluated / "truth.safetensors", "tumour").astype(bool)
    prediction, organ = (read_tensor(path, name).astype(bool) for name in ("mask", "organ"))
    z = read_tensor(path, "z")
    largest = read_tensor(path, "probability").max(axis=(1, 2), where=organ, initial=0.0).tolist()
    if truth is not None and truth.shape != prediction.shape:
        raise InputError(path, f"truth has shape {truth.shape}, the prediction {prediction.shape}")
    if not len(z):
        return []
    case_side = pictures.crop_around(organ.any(axis=0), min_side=1).side
    prepared = load_prepared(result.prepared / "prepared.safetensors")
    px_mm = prepared.spacing_mm[0]
    rows = []
    for rank, i in pick_slices(truth, prediction, largest):
        view = pictures.SliceView(
            pixels=read_tensor(path, "pixels", i),
            restored=read_tensor(path, "restored", i),
            organ=organ[i],
            probability=read_tensor(path, "probability", i),
            prediction=prediction[i],
            truth=None if truth is None else truth[i],
        )
        shown = ShownSlice(
            rank=rank,
            z=int(z[i]),
            dice=None if truth is None else _slice_dice(truth[i], prediction[i]),
            true_px=None if truth is None else int(np.count_nonzero(truth[i])),
            predicted_px=int(np.count_nonzero(prediction[i])),
            max_probability=largest[i],
        )
        # the liver's tip, enlarged, but never into a few huge pixels
        crop = pictures.crop_around(organ[i], min_side=case_side // 3)
        rows.append(_Row(shown, pictures.panel_row(view, crop, panel_px, px_mm=px_mm)))
    return rows


def _curve_title(curve: Curve) -> str:
    loss = {"l1": "L1", "l2_ssim": "L2 + SSIM"}.get(curve.restoration_loss, curve.restoration_loss)
    names = {
        "restoration": f"Phase one: restoration, {loss} loss",
        "segmentation": "Phase two: segmentation, focal loss",
        "joint": f"Both networks jointly, {loss} + focal loss",
    }
    return f"{names.get(curve.phase, curve.phase)}, {curve.epochs} epoch{'' if curve.epochs == 1 else 's'}"


def _write_preview(path: Path, cases: Sequence[CaseReport], pictured: Sequence[Sequence[_Row]], tag: str) -> None:
    """The case in the middle by 3-D Dice, neither the best nor the worst; without truth the first."""
    drawable = [(case, rows) for case, rows in zip(cases, pictured, strict=True) if rows]
    if not drawable:
        return
    measured = sorted(
        ((case.metrics.dice_3d, number) for number, (case, _) in enumerate(drawable) if case.metrics), reverse=True
    )
    case, rows = drawable[measured[len(measured) // 2][1] if measured else 0]
    kind = f" ({tag})" if case.inserted else ""
    picture = pictures.stack_rows(
        [(f"{case.case_id}: {slice_caption(row.shown)}{kind}", row.picture) for row in rows],
        [
            "slice (R left, A top)",
            "restoration",
            "|difference|",
            "probability 0 to 1",
            "orange: prediction" + (f"; blue: {'inserted' if case.inserted else 'truth'}" if case.metrics else ""),
        ],
    )
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def slice_caption(shown: ShownSlice) -> str:
    """`Best slice, z = 41: Dice 0.812`, or without truth the predicted area and the largest probability."""
    head = f"{shown.rank.capitalize()} slice, z = {shown.z}"
    if shown.true_px is not None:
        return f"{head}: Dice {_figure(shown.dice)}"
    return f"{head}: {shown.predicted_px:,} px predicted, largest probability {shown.max_probability:.2f}"


def _slice_dice(truth: Bool[np.ndarray, "S S"], prediction: Bool[np.ndarray, "S S"]) -> float | None:
    both = int(np.count_nonzero(truth & prediction))
    return dice_of_counts(both, int(np.count_nonzero(prediction)) - both, int(np.count_nonzero(truth)) - both)


def _figure(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _volume(mm3: float) -> str:
    return f"{mm3 / 1000:.1f} mL" if mm3 >= 1000 else f"{mm3:.0f} mm³" if mm3 >= 10 else f"{mm3:.1f} mm³"


def _numbers(value: Number | list[Number]) -> str:
    if isinstance(value, list):
        return ", ".join(_numbers(part) for part in value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _heading(key: str) -> str:
    words = {"mm3": "mm³", "hu": "HU", "2d": "2-D", "3d": "3-D", "dice": "Dice", "auroc": "AUROC", "sd": "(sd)"}
    text = " ".join(words.get(word, word) for word in key.split("_"))
    return text[0].upper() + text[1:]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
