"""Content of a liver report: the schema of `report.json`, and its parts read from a run's folders.

It contains no paths and no patient data. Cases appear under their ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from medad.base.errors import InputError
from medad.base.storage import read_json, read_record
from medad.base.text import hide_paths
from medad.evaluation.metrics import CaseEvaluation, CaseMetrics, Summary
from medad.evaluation.postprocess import Lesion
from medad.reporting.failures import FailureRow
from medad.reporting.headline import Headline
from medad.steps.results import PAGES, CaseResult

SCHEMA_VERSION = 1

STATEMENT = (
    "Research use only. Not a medical device. Do not use these results for the care of a patient.",
    "The networks were trained on livers without known lesions. Synthetic anomalies were added to the training slices. "
    "No tumour label was used for training.",
)
INSERTED_REAL, INSERTED_GENERATED = "inserted lesions, real CT", "inserted lesions, generated phantom"
INSERTED_STATEMENT = (
    "Before preprocessing, this program inserted lesions of known shape and contrast into the scans. The results show "
    "how well inserted lesions are found. They are not an estimate for real tumours."
)

CURVE_POINTS = 500
"""Most points of a training curve. A longer curve is averaged over equal ranges of steps."""


Number = int | float | None
Rank = Literal["best", "median", "worst", "highest", "lowest"]
Model = TypeVar("Model", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Inserted(_Part):
    """Inserted lesions: whether there are any, in which cases, and the statement for the reader."""

    any: bool
    tag: str | None
    """Short text: what the lesions were inserted into. None: no lesion was inserted."""
    statement: str | None
    cases: tuple[str, ...]


class CaseFacts(_Part):
    """Facts about a case from case.json of its prepared folder."""

    liver_ml: float
    slices: int
    spacing_mm: tuple[float, float, float]
    liver_median_hu: float
    excluded_ml: float = 0.0
    warnings: tuple[str, ...] = ()


class LesionList(_Part):
    """Content of lesions.json of a segmented case."""

    status: str
    threshold: float
    threshold_rule: str = ""
    min_lesion_mm3: float
    liver_ml: float
    lesion_count: int
    lesion_ml: float
    lesions: tuple[Lesion, ...]
    warnings: tuple[str, ...] = ()


class ShownSlice(_Part):
    """A slice shown in the HTML report."""

    rank: Rank
    z: int
    """Slice index in the reoriented scan, counted from 0 at the feet."""
    dice: float | None
    """Dice of the slice. None: no ground truth, or both masks are empty."""
    true_px: int | None
    predicted_px: int
    max_probability: float


class CaseReport(_Part):
    case_id: str
    inserted: bool
    inserted_lesions: tuple[dict[str, Number | list[Number]], ...]
    facts: CaseFacts
    seconds: dict[str, float]
    """Durations from case.json of the segmentation."""
    lesions: LesionList
    metrics: CaseMetrics | None
    micro_dice_2d: float | None
    slice_auroc: float | None
    shown_slices: tuple[ShownSlice, ...]
    page: str | None = None
    """Address of the page to scroll through the scan, relative to the report. None: there is none."""


class Curve(_Part):
    """Training curve from curve.json of a phase, averaged to at most `CURVE_POINTS` points."""

    phase: str
    """Phase: `restoration`, `segmentation`, or `joint` (one curve for both networks)."""
    epochs: int
    restoration_loss: str = "l1"
    seconds: float | None = None
    steps: tuple[float, ...]
    loss: tuple[float, ...]


class ReportDocument(_Part):
    """Complete content of the report. `report.json` has the same fields."""

    schema_version: int
    kind: str
    name: str
    statement: tuple[str, ...]
    inserted: Inserted
    notes: tuple[str, ...]
    headline: tuple[Headline, ...]
    summary: Summary | None
    """Metrics over all cases. None: no case has ground truth."""
    definitions: dict[str, str]
    cases: tuple[CaseReport, ...]
    failures: tuple[FailureRow, ...]
    curves: tuple[Curve, ...]
    settings: dict[str, Any]
    versions: dict[str, str]


def read_case(
    result: CaseResult[Path], evaluation: CaseEvaluation | None, shown_slices: Sequence[ShownSlice]
) -> CaseReport:
    """Read the report's content about a case. Raises InputError if a file is missing or damaged."""
    assert result.segmented is not None, "a finished case is segmented"
    facts = read_record(CaseFacts, result.prepared / "case.json")
    metrics = evaluation.metrics if evaluation else None
    inserted: list[dict[str, Any]] = []
    if result.inserted is not None:
        inserted = read_json(result.inserted / "lesions.json")["lesions"]
    timing = read_json(result.segmented / "case.json")
    return CaseReport(
        case_id=result.case_id,
        inserted=result.inserted is not None,
        # numbers only: free text could contain a person's name
        inserted_lesions=tuple({key: value for key, value in one.items() if _is_numeric(value)} for one in inserted),
        facts=facts.model_copy(update={"warnings": tuple(hide_paths(text) for text in facts.warnings)}),
        seconds={key: float(timing[key]) for key in sorted(timing) if "seconds" in key and _is_numeric(timing[key])},
        lesions=read_record(LesionList, result.segmented / "lesions.json"),
        # evaluations are cached by content, so this one can have another case's id
        metrics=metrics.model_copy(update={"case_id": result.case_id}) if metrics else None,
        micro_dice_2d=metrics.micro_dice_2d if metrics else None,
        slice_auroc=metrics.slice_auroc if metrics else None,
        shown_slices=tuple(shown_slices),
        page=None if result.page is None else f"{PAGES}/{result.case_id}.html",
    )


def read_curve(folder: Path) -> Curve:
    """Read the training curve of a network folder. Raises InputError if it is missing or damaged."""
    curve = read_record(Curve, folder / "curve.json")
    if len(curve.steps) != len(curve.loss):
        raise InputError(folder / "curve.json", f"{len(curve.steps)} steps but {len(curve.loss)} losses")
    if len(curve.steps) <= CURVE_POINTS:
        return curve
    steps, loss = (
        tuple(float(part.mean()) for part in np.array_split(np.array(values, dtype=np.float64), CURVE_POINTS))
        for values in (curve.steps, curve.loss)
    )
    return curve.model_copy(update={"steps": steps, "loss": loss})


def _is_numeric(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_numeric(part) for part in value)
    return isinstance(value, int | float)


def read_tensor(path: Path, name: str, index: int | None = None) -> Any:
    """Return one tensor of a safetensors file, or its entry `index` along the first axis."""
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise InputError(path, f"cannot read tensor {name}: {error}") from error
