"""A threshold that means something: one scale for the probabilities of all scans, and a threshold on it.

The threshold is found without any tumour label, on healthy scans that did not train the model. It uses lesions that
were inserted into them, and the volume that the model marks in them without lesions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64
from numpy import ndarray
from pydantic import BaseModel, ConfigDict

from medad.base.numbers import logit
from medad.config.liver import PostprocessSettings
from medad.evaluation.experience import ScanFacts

THRESHOLDS = np.round(np.arange(0.1, 0.96, 0.02), 2)
"""Thresholds that are compared."""


class Calibration(BaseModel):
    """The calibrated threshold of a model, and how it was found."""

    model_config = ConfigDict(frozen=True)

    threshold: float
    """Probability on the common scale from which a voxel is tumour."""
    middle: float
    """Median of the logit in healthy liver. Each scan's median is moved to it."""
    decided_by: Literal["dice", "false positives", "lowest threshold", "highest threshold"]
    """Rule that decided the threshold. `dice`: best overlap with the inserted lesions. `false positives`: the allowed
    volume in healthy liver is reached. The others: the end of the range of thresholds was reached."""
    allowed_ml: float
    """Allowed mean volume marked in a healthy liver, in ml."""
    marked_ml: float
    """Mean volume marked in the healthy livers at this threshold, in ml."""
    dice: float
    """Mean Dice with the inserted lesions at this threshold."""
    healthy_scans: int
    """Number of healthy scans that were left out once."""
    copies: int
    """Number of copies with inserted lesions."""
    experience: tuple[ScanFacts, ...] = ()
    """Facts about the healthy scans."""


@dataclass(frozen=True)
class CalibrationCurve:
    """Marked volume and overlap at each of `THRESHOLDS`, for one scan.

    Attributes
    ----------
    marked_ml
        Volume marked in the healthy scan.
    dice
        Dice of each copy with its inserted lesions.
    """

    marked_ml: Float64[ndarray, " thresholds"]
    dice: Float64[ndarray, "copies thresholds"]


def threshold_rule(settings: PostprocessSettings, threshold: float, calibration: Calibration | None) -> str:
    """Return how the threshold of a scan came about, as a phrase for a report. It says when a bound decided."""
    if isinstance(settings.threshold, float):
        return "set in the configuration"
    if settings.threshold == "calibrated" and calibration is not None:
        return (
            f"calibrated on {calibration.healthy_scans} healthy scans that were left out of training, where it marks "
            f"{calibration.marked_ml:.1f} mL per liver (allowed: {calibration.allowed_ml:g} mL); "
            f"decided by: {calibration.decided_by}"
        )
    bound = threshold in settings.auto_range
    return "chosen for this scan by the triangle method" + (", limited by auto_range" if bound else "")


def healthy_middle(probability: Float32[ndarray, "*S"], organ: Bool[ndarray, "*S"]) -> float:
    """Return the median of the logit over the voxels of a liver.

    It is that of healthy tissue as long as tumours fill less than about a third of the liver.
    """
    return float(np.median(logit(probability[organ])))


def to_common_scale(
    probability: Float32[ndarray, "*S"], organ: Bool[ndarray, "*S"], middle: float
) -> Float32[ndarray, "*S"]:
    """Return the probabilities of a scan on the scale that all scans share. They are 0 outside the liver.

    The logit is shifted so that its median in this liver becomes `middle`. The order of voxels does not change.
    """
    values = logit(probability) + np.float32(middle - healthy_middle(probability, organ))
    return np.where(organ, 1 / (1 + np.exp(-values)), 0).astype(np.float32)


def choose_threshold(curves: Sequence[CalibrationCurve], middle: float, allowed_ml: float) -> Calibration:
    """Return the threshold with the best mean Dice among those that mark at most `allowed_ml` of healthy liver.

    Marked volumes and Dice are means over scans and copies. If every threshold marks more, the highest one is chosen.
    """
    marked = np.mean([curve.marked_ml for curve in curves], axis=0)
    dice = np.mean(np.concatenate([curve.dice for curve in curves]), axis=0)
    allowed = marked <= allowed_ml
    best = int(np.argmax(dice))
    if not allowed.any():
        chosen, decided = len(THRESHOLDS) - 1, "highest threshold"
    else:
        chosen = int(np.argmax(np.where(allowed, dice, -1.0)))
        decided = "dice" if chosen == best else "false positives"
        if chosen in (0, len(THRESHOLDS) - 1):
            decided = "lowest threshold" if chosen == 0 else "highest threshold"
    return Calibration(
        threshold=float(THRESHOLDS[chosen]),
        middle=middle,
        decided_by=decided,
        allowed_ml=allowed_ml,
        marked_ml=float(marked[chosen]),
        dice=float(dice[chosen]),
        healthy_scans=len(curves),
        copies=sum(len(curve.dice) for curve in curves),
    )
