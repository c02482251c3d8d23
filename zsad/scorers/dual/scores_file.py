"""Scores of the dual-image scorer on disk, as `zsad.steps.score_dual` writes them, read image by image.

`scores.safetensors` has one row a crop with the unfused maps; `scores.json` names images by their digest alone.
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
from zsad.config.run import ScoreSettings, Variant
from zsad.scorers.dual.scorer import PARTS, Evidence, fuse_map

SCHEMA: Literal["adflows zsad scores 1"] = "adflows zsad scores 1"
SCORES_FILE, INDEX_FILE = "scores.safetensors", "scores.json"


class ScoredImage(BaseModel):
    """One image of scores.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    first_row: int
    rows: int
    """Crops, and rows of scores.safetensors."""
    references: tuple[str, ...]
    """sha256 of the images it was compared with; empty where no variant needs any."""
    image_score: dict[Variant, float]
    """Higher is more anomalous."""


class ScoresIndex(BaseModel):
    """scores.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_name: Literal["adflows zsad scores 1"] = Field(default=SCHEMA, alias="schema")
    seed: int
    tau: float
    settings: ScoreSettings
    """Without the batch size, which changes nothing."""
    images: tuple[ScoredImage, ...]


class Scores:
    """The scores that `zsad.steps.score_dual.score_category` wrote, read image by image.

    Parameters
    ----------
    folder
        Where they were written.

    Raises
    ------
    InputError
        The folder holds no such scores, or they are damaged.
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
        """Of the references drawn and the pseudo anomalies."""
        return self.index.seed

    @property
    def digests(self) -> Sequence[str]:
        """sha256 of each image, by number."""
        return [image.sha256 for image in self.index.images]

    def image_score(self, variant: str) -> Float64[ndarray, " n"]:
        """Each image's score, in the order of the index; higher is more anomalous."""
        known = self._require(variant)
        return np.array([image.image_score[known] for image in self.index.images], dtype=np.float64)

    def patch_map(self, i: int, variant: str) -> Float32[ndarray, "C g g"]:
        """Fused patch maps of image `i`'s crops; higher is more anomalous. Raises InputError."""
        known = self._require(variant)
        fused = fuse_map(self.evidence(i, known), known, self.index.settings)
        grid = round(fused.shape[1] ** 0.5)
        return fused.reshape(len(fused), grid, grid)

    def evidence(self, i: int, variant: Variant) -> Evidence:
        """What image `i`'s score of a variant was fused from. Raises InputError."""
        self._require(variant)
        image = self.index.images[i]
        rows = slice(image.first_row, image.first_row + image.rows)
        try:
            with reading(self._path), safe_open(self._path, framework="numpy") as file:
                parts = {part: np.array(file.get_slice(part)[rows]) for part in PARTS[variant]}
        except SafetensorError as error:
            raise InputError(self._path, "the scores are damaged or incomplete") from error
        if any(len(part) != image.rows for part in parts.values()):
            raise InputError(self._path, "holds fewer rows than its index says")
        return Evidence(parts.pop("class", None), **parts)

    def _require(self, variant: str) -> Variant:
        for known in self.index.settings.variants:
            if known == variant:
                return known
        raise ValueError(f"variant {variant} was not scored, only {', '.join(self.index.settings.variants)}")
