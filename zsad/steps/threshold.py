"""Step that finds a decision threshold from the scores of normal images, and the file that stores it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict, Field

from medad.base.errors import ConfigError, InputError
from medad.base.storage import atomic_path, read_record
from zsad.scorers.stored_scores import open_scores

THRESHOLD_FILE = "threshold.json"


class SavedThreshold(BaseModel):
    """Content of `threshold.json`: a threshold on image scores, and what it is valid for."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    schema_name: Literal["adflows zsad threshold 1"] = Field(default="adflows zsad threshold 1", alias="schema")
    threshold: float
    """Images with this score or more are flagged."""
    source: Literal["normal", "quantile"]
    """`normal`: from the scores of normal images. `quantile`: from all scored images."""
    images: int
    """Number of images from whose scores the threshold was computed."""
    rate: float
    """Share of these images that may reach the threshold."""
    method: str
    """Name of the system."""
    encoder: str
    """Description of the encoder."""
    judged_by: str
    """Digest of everything that scores depend on besides the image: system, encoder, category and normal images."""


def save_threshold(
    scores: Path,
    variant: str,
    source: Literal["normal", "quantile"],
    rate: float,
    method: str,
    encoder: str,
    judged_by: str,
    out: Path,
) -> None:
    """Write `threshold.json` into the existing folder `out`.

    Parameters
    ----------
    scores
        Folder of `zsad.steps.score.score_system`. With `source` normal, each of its images is normal and was compared
        only with the others (leave one out).
    variant
        Name of the score.
    rate
        Share of the images that may reach the threshold, above 0 and below 1.

    Raises
    ------
    InputError
        The scores are missing or damaged.
    """
    values = open_scores(scores).image_score(variant)
    record = SavedThreshold(
        threshold=conformal_threshold(values, rate) if source == "normal" else float(np.quantile(values, 1 - rate)),
        source=source,
        images=len(values),
        rate=rate,
        method=method,
        encoder=encoder,
        judged_by=judged_by,
    )
    with atomic_path(out / THRESHOLD_FILE) as path:
        path.write_text(record.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


def conformal_threshold(normal: Float64[np.ndarray, " n"], rate: float) -> float:
    """Return the lowest threshold that a further normal image reaches with probability `rate` at most.

    This is the next number above the k-th lowest score, k = ceil((n + 1) (1 - rate)) (split conformal prediction).
    If n is too small for this rate, it is the next number above the highest score; then the probability is 1 / (n + 1).
    """
    rising = np.sort(normal)
    k = min(math.ceil((len(rising) + 1) * (1 - rate)), len(rising))
    return float(np.nextafter(rising[k - 1], np.inf))


def read_threshold(path: Path) -> SavedThreshold:
    """Read a threshold that `save_threshold` wrote. Raises InputError."""
    if not path.is_file():
        raise InputError(path, "no such file; --save-threshold writes one")
    return read_record(SavedThreshold, path, "a saved threshold")


def require_same_judge(saved: SavedThreshold, path: Path, method: str, encoder: str, judged_by: str) -> None:
    """Raise ConfigError if the threshold was made for other scores."""
    if saved.method != method:
        raise ConfigError(
            f"{path.name}: this threshold belongs to {saved.method}, but the images are scored by {method}"
        )
    if saved.encoder != encoder:
        raise ConfigError(f"{path.name}: this threshold belongs to the encoder {saved.encoder}, not to {encoder}")
    if saved.judged_by != judged_by:
        raise ConfigError(
            f"{path.name}: this threshold was made with other settings or other normal images, or for another category"
        )
