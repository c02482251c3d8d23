"""Scores of the dual-image scorer on disk, written by `zsad.scorers.dual.score` and read image by image.

`scores.safetensors` has one row per crop, with the maps before fusion. `scores.json` identifies images only by their
digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from medad.base.errors import InputError
from medad.base.storage import read_record, reading
from zsad.clip.feature_store import ImageProblem
from zsad.config.run import ScoreSettings, Variant
from zsad.scorers.dual.scorer import PARTS, Evidence, fuse_map

SCHEMA: Literal["adflows zsad scores 1"] = "adflows zsad scores 1"
SCORES_FILE, INDEX_FILE = "scores.safetensors", "scores.json"


class ScoredImage(BaseModel):
    """Entry of one image in scores.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    first_row: int
    rows: int
    """Number of crops, which is the number of rows in scores.safetensors."""
    references: tuple[str, ...]
    """sha256 of the reference images; empty if no variant needs any."""
    image_score: dict[Variant, float]
    """Image score by variant; higher is more anomalous."""


class ScoresIndex(BaseModel):
    """Content of scores.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_name: Literal["adflows zsad scores 1"] = Field(default=SCHEMA, alias="schema")
    seed: int
    tau: float
    settings: ScoreSettings
    """Settings, without the batch size, which has no effect on scores."""
    images: tuple[ScoredImage, ...]
    problems: tuple[ImageProblem, ...] = ()
    """Images that could not be scored."""


class Scores:
    """Scores written by `zsad.scorers.dual.score.score_category`, read image by image.

    Parameters
    ----------
    folder
        Folder of the scores.

    Raises
    ------
    InputError
        The scores are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SCORES_FILE
        path = folder / INDEX_FILE
        self.index = read_record(ScoresIndex, path, "an index of scores")
        with reading(self._path):
            self._path.stat()

    def __len__(self) -> int:
        return len(self.index.images)

    @property
    def seed(self) -> int:
        """Return the seed of the reference images and the pseudo anomalies."""
        return self.index.seed

    @property
    def align_corners(self) -> bool:
        """Return whether the corner patches of a map are at the corner pixels of its crop: never for this scorer."""
        return False

    @property
    def digests(self) -> Sequence[str]:
        """Return the sha256 of each image, by number."""
        return [image.sha256 for image in self.index.images]

    @property
    def problems(self) -> tuple[ImageProblem, ...]:
        """Return the images that could not be scored."""
        return self.index.problems

    def references(self, i: int) -> tuple[str, ...]:
        """Return the sha256 of the reference images of image `i`."""
        return self.index.images[i].references

    def image_score(self, variant: str) -> Float64[ndarray, " n"]:
        """Return the score of each image, in the order of the index; higher is more anomalous."""
        known = self._require(variant)
        return np.array([image.image_score[known] for image in self.index.images], dtype=np.float64)

    def patch_map(self, i: int, variant: str) -> Float32[ndarray, "C g g"]:
        """Return the fused patch maps of image `i`'s crops; higher is more anomalous. Raise InputError."""
        known = self._require(variant)
        fused = fuse_map(self.evidence(i, known), known, self.index.settings)
        grid = round(fused.shape[1] ** 0.5)
        return fused.reshape(len(fused), grid, grid)

    def evidence(self, i: int, variant: Variant) -> Evidence:
        """Return the parts from which image `i`'s score of a variant was fused. Raise InputError."""
        self._require(variant)
        image = self.index.images[i]
        rows = slice(image.first_row, image.first_row + image.rows)
        try:
            with reading(self._path), safe_open(self._path, framework="numpy") as file:
                parts = {part: np.array(file.get_slice(part)[rows]) for part in PARTS[variant]}
        except SafetensorError as error:
            raise InputError(self._path, "the scores are damaged or incomplete") from error
        if any(len(part) != image.rows for part in parts.values()):
            raise InputError(self._path, "has fewer rows than its index says")
        return Evidence(parts.pop("class", None), **parts)

    def _require(self, variant: str) -> Variant:
        for known in self.index.settings.variants:
            if known == variant:
                return known
        raise ValueError(f"variant {variant} was not scored, only {', '.join(self.index.settings.variants)}")
