"""The cached step that calibrates a model's threshold on healthy scans that its members did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from pydantic import ValidationError

from medad.anomalies.copies import NO_SHIFT, load_copies
from medad.base.errors import InputError
from medad.base.storage import read_json, write_bytes
from medad.classifier.stacking import Stacking
from medad.config.liver import InferenceSettings, PostprocessSettings
from medad.evaluation.calibration import (
    THRESHOLDS,
    Calibration,
    CalibrationCurve,
    choose_threshold,
    healthy_middle,
    to_common_scale,
)
from medad.evaluation.experience import ScanFacts, scan_facts
from medad.evaluation.postprocess import postprocess
from medad.slices.prepared_file import PREPARED, PreparedCase, load_prepared
from medad.steps.predict import LoadedMember, load_members, predict_case
from medad.steps.results import LeftOut

CALIBRATION = "calibration.json"
WHOLE_LIVER_ML = 1500.0
"""Volume of a liver to which the marked share of a scan is scaled, because a scan may show only a part."""
COPIES = 4
"""Number of copies with inserted lesions of each scan."""


def calibrate(
    left_out: Sequence[LeftOut[Path]],
    inference: InferenceSettings,
    post: PostprocessSettings,
    out: Path,
    *,
    device: str = "auto",
    largest_batch: int | None = None,
) -> None:
    """Find the common scale and the threshold of a model, and write calibration.json (a `Calibration`).

    Each member predicts only the scans that did not train it, without lesions and with inserted lesions.

    Parameters
    ----------
    left_out
        Members with the cases that they were not trained on. Members without such cases are skipped.
    inference, post
        Settings with which scans will be segmented. `post.false_positive_ml` limits the threshold.

    Raises
    ------
    InputError
        No member has a case that was left out, no copy has a lesion, or a file is damaged.
    """
    batch_size = min(inference.batch_size, largest_batch or inference.batch_size)
    experience = []
    found: list[tuple[PreparedCase, Float32[ndarray, "N S S"], list[tuple[ndarray, ndarray]]]] = []
    for each in left_out:
        if not each.prepared:
            continue
        members = load_members([each.member], inference, device)
        for folder, copies in zip(each.prepared, each.copies, strict=True):
            case = load_prepared(folder / PREPARED)
            healthy = predict_case(case, members, inference, batch_size).probability
            experience.append(facts_of(folder, case))
            found.append((case, healthy, _with_lesions(case, copies, members, inference, batch_size)))
    if not found:
        raise InputError("calibration", "no healthy scan was left out of a member's training")
    middle = float(np.median([healthy_middle(healthy, case.slices.organ) for case, healthy, _ in found]))
    curves = [_curve(case, healthy, copies, middle, post) for case, healthy, copies in found]
    if not any(len(curve.dice) for curve in curves):
        raise InputError("calibration", "no copy of a healthy scan has a lesion; see synthesis.solid")
    calibration = choose_threshold(curves, middle, post.false_positive_ml)
    calibration = calibration.model_copy(update={"experience": tuple(experience)})
    write_bytes(out / CALIBRATION, (calibration.model_dump_json(indent=1) + "\n").encode())


def facts_of(prepared: Path, case: PreparedCase) -> ScanFacts:
    """Return the facts about a prepared case that matter to a model."""
    stacking = Stacking.of(case)
    return scan_facts(stacking.stack(case), read_json(prepared / "case.json")["liver_median_hu"], case.spacing_mm[2])


def load_calibration(folder: Path) -> Calibration:
    """Read what `calibrate` wrote. Raises InputError for a missing or damaged file."""
    path = folder / CALIBRATION
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(path, f"the calibration cannot be read ({type(error).__name__})") from error


def _with_lesions(
    case: PreparedCase,
    copies: Path,
    members: Sequence[LoadedMember],
    inference: InferenceSettings,
    batch_size: int,
) -> list[tuple[Float32[ndarray, "N S S"], Bool[ndarray, "N S S"]]]:
    """Return probability and lesions of some copies of a case."""
    lesions = load_copies(copies, slice(COPIES))
    predicted = []
    for shift, mask in zip(lesions.shift, lesions.mask, strict=True):
        pixels = np.clip(case.slices.pixels.astype(np.int16) + shift - NO_SHIFT, 0, 255).astype(np.uint8)
        copy = replace(
            case, slices=replace(case.slices, pixels=np.where(case.slices.organ, pixels, case.slices.pixels))
        )
        predicted.append((predict_case(copy, members, inference, batch_size).probability, mask))
    return predicted


def _curve(
    case: PreparedCase,
    healthy: Float32[ndarray, "N S S"],
    copies: Sequence[tuple[Float32[ndarray, "N S S"], Bool[ndarray, "N S S"]]],
    middle: float,
    post: PostprocessSettings,
) -> CalibrationCurve:
    organ = case.slices.organ
    voxel_mm3 = float(np.prod(case.spacing_mm))
    common = to_common_scale(healthy, organ, middle)
    scale_ml = WHOLE_LIVER_ML / np.count_nonzero(organ)
    at_threshold = post.model_copy(update={"outline_share": 1.0})
    marked = [
        np.count_nonzero(
            postprocess(common, organ, voxel_mm3, at_threshold.model_copy(update={"threshold": float(threshold)}))
        )
        for threshold in THRESHOLDS
    ]
    dice = []
    for probability, lesion in copies:
        values = to_common_scale(probability, organ, middle)
        truth = np.count_nonzero(lesion)
        if truth == 0:
            continue
        inside, over = np.sort(values[lesion]), np.sort(values[organ])
        hits = truth - np.searchsorted(inside, THRESHOLDS.astype(np.float32))
        predicted = len(over) - np.searchsorted(over, THRESHOLDS.astype(np.float32))
        dice.append(2 * hits / (truth + predicted))
    shaped = np.array(dice, dtype=np.float64).reshape(-1, len(THRESHOLDS))
    return CalibrationCurve(np.array(marked, dtype=np.float64) * scale_ml, shaped)
