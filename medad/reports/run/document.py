"""What a report holds: the schema of `report.json`, and how it is read from the folders of a run.

No path and no patient data goes in: cases appear under their ids.
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
from medad.reporting.failures import ShownFailure
from medad.steps.results import CaseResult

SCHEMA_VERSION = 1

STATEMENT = (
    "Research use only. Not a medical device: nothing here may guide the care of a patient.",
    "The networks were trained on livers without known lesions, with synthetic anomalies drawn into them. "
    "No tumour label was used for training.",
)
INSERTED_REAL, INSERTED_GENERATED = "inserted lesions, real CT", "inserted lesions, generated phantom"
INSERTED_STATEMENT = (
    "The lesions looked for were drawn into the scans by this program before preprocessing, "
    "with known shape and contrast. The figures tell how well inserted lesions are found; they are no estimate for "
    "tumours."
)

CURVE_POINTS = 500
"""A longer training curve is averaged over equal stretches of steps."""


Number = int | float | None
Rank = Literal["best", "median", "worst", "highest", "lowest"]
Model = TypeVar("Model", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Inserted(_Part):
    """Whether lesions were inserted into scans, said in words, and into which."""

    any: bool
    tag: str | None
    """In three words: inserted into what."""
    statement: str | None
    cases: tuple[str, ...]


class CaseFacts(_Part):
    """From the prepared folder's case.json."""

    liver_ml: float
    slices: int
    spacing_mm: tuple[float, float, float]
    liver_median_hu: float
    warnings: tuple[str, ...] = ()


class LesionList(_Part):
    """lesions.json of a segmented case."""

    status: str
    threshold: float
    min_lesion_mm3: float
    liver_ml: float
    lesion_count: int
    lesion_ml: float
    lesions: tuple[Lesion, ...]


class ShownSlice(_Part):
    """A slice that the HTML shows."""

    rank: Rank
    z: int
    """Index from the feet, from 0, in the scan brought to the fixed orientation."""
    dice: float | None
    """None without truth, and where neither mask has a pixel."""
    true_px: int | None
    predicted_px: int
    max_probability: float


class CaseReport(_Part):
    case_id: str
    inserted: bool
    inserted_lesions: tuple[dict[str, Number | list[Number]], ...]
    facts: CaseFacts
    seconds: dict[str, float]
    """What the segmentation's case.json says in seconds."""
    lesions: LesionList
    metrics: CaseMetrics | None
    micro_dice_2d: float | None
    slice_auroc: float | None
    shown_slices: tuple[ShownSlice, ...]


class Curve(_Part):
    """curve.json of a trained phase, averaged to at most `CURVE_POINTS` points."""

    phase: str
    """`restoration`, `segmentation`, or `joint`: one curve of both networks."""
    epochs: int
    restoration_loss: str = "l1"
    seconds: float | None = None
    steps: tuple[float, ...]
    loss: tuple[float, ...]


class ReportDocument(_Part):
    """Everything in the report; `report.json` is this, field by field."""

    schema_version: int
    kind: str
    name: str
    statement: tuple[str, ...]
    inserted: Inserted
    notes: tuple[str, ...]
    summary: Summary | None
    """None when no case has truth."""
    definitions: dict[str, str]
    cases: tuple[CaseReport, ...]
    failures: tuple[ShownFailure, ...]
    curves: tuple[Curve, ...]
    settings: dict[str, Any]
    versions: dict[str, str]


def read_case(
    result: CaseResult[Path], evaluation: CaseEvaluation | None, shown_slices: Sequence[ShownSlice]
) -> CaseReport:
    """What the report says about a case. Raises InputError for a file that is missing or damaged."""
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
        # numbers only: free text could name a person
        inserted_lesions=tuple({key: value for key, value in one.items() if _is_numeric(value)} for one in inserted),
        facts=facts.model_copy(update={"warnings": tuple(hide_paths(text) for text in facts.warnings)}),
        seconds={key: float(timing[key]) for key in sorted(timing) if "seconds" in key and _is_numeric(timing[key])},
        lesions=read_record(LesionList, result.segmented / "lesions.json"),
        # an evaluation is cached by content and may have been made under another id
        metrics=metrics.model_copy(update={"case_id": result.case_id}) if metrics else None,
        micro_dice_2d=metrics.micro_dice_2d if metrics else None,
        slice_auroc=metrics.slice_auroc if metrics else None,
        shown_slices=tuple(shown_slices),
    )


def read_curve(folder: Path) -> Curve:
    """The training curve of a trained folder. Raises InputError for one that is missing or damaged."""
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
    """One tensor of a safetensors file, or its entry `index` along the first axis."""
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise InputError(path, f"no whole tensor {name}: {error}") from error
