"""Scores of one system on disk: `maps.npy` f32 [R g g], one row per crop, and `system_scores.json`, written last.

Images are identified only by their digest. Each map is written at once, so memory does not grow with the set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray
from numpy.lib import format as npy
from pydantic import BaseModel, ConfigDict, Field

from medad.base.errors import InputError
from medad.base.storage import atomic_path, read_record, reading
from zsad.clip.feature_store import FeatureStore, ImageProblem, data_offset
from zsad.config.system_base import ONLY_VARIANT
from zsad.scorers.interface import Scored

MAPS_FILE, INDEX_FILE = "maps.npy", "system_scores.json"


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SystemScore(_Stored):
    """Score of one image, and the rows of its maps."""

    sha256: str
    first_row: int
    rows: int
    score: float
    """Higher is more anomalous."""
    references: tuple[str, ...] = ()
    """sha256 of the images with which this one was compared."""


class SystemIndex(_Stored):
    """Content of `system_scores.json`."""

    model_config = ConfigDict(populate_by_name=True)

    schema_name: Literal["adflows zsad system scores 1"] = Field(default="adflows zsad system scores 1", alias="schema")
    system: dict[str, Any]
    """Settings of the system."""
    seed: int
    rows: int
    """Number of maps in `maps.npy`."""
    side: int
    """Side g of the maps."""
    images: tuple[SystemScore, ...]
    problems: tuple[ImageProblem, ...] = ()
    """Images that could not be scored."""


def write_system_scores(
    out: Path,
    store: FeatureStore,
    scored: Iterable[Scored],
    *,
    system: dict[str, Any],
    seed: int,
    references: Sequence[Sequence[str]] = (),
) -> None:
    """Write a system's results into `out`. Results may come in any order. `out` is created if it does not exist.

    Parameters
    ----------
    references
        For each image of `store` the sha256 of the images with which it was compared. Empty: unknown.

    Raises
    ------
    InputError
        No image could be scored.
    ValueError
        The system has a bug: an image is missing or appears twice, or a map or score has a wrong shape or is not
        finite.
    DiskFullError
        The disk is full. No partial file remains.
    """
    rows = sum(image.rows for image in store.images)
    scores: dict[int, float] = {}
    problems: dict[int, str] = {}
    side = 0
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / MAPS_FILE) as path, path.open("wb") as file:
        start = 0
        for one in scored:
            if one.problem is not None:
                problems[one.number] = one.problem
                continue
            maps = np.ascontiguousarray(one.map.detach().cpu().numpy(), dtype="<f4")
            if not scores:
                side = maps.shape[-1]
                npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, side, side)})
                start = file.tell()
            image_rows = store.rows_of(one.number)
            if maps.shape != (len(image_rows), side, side) or not np.isfinite(maps).all() or not np.isfinite(one.score):
                raise ValueError(f"image {one.number}: score {one.score}, maps of shape {maps.shape}, side {side}")
            if one.number in scores:
                raise ValueError(f"image {one.number} was scored twice")
            scores[one.number] = float(one.score)
            file.seek(start + 4 * side * side * image_rows.start)
            file.write(maps.data)
        if scores:
            file.truncate(start + 4 * side * side * rows)  # rows of images without a score are zero
    if sorted([*scores, *problems]) != list(range(len(store))):
        raise ValueError(f"{len(scores)} of {len(store)} images were scored")
    if not scores:
        raise InputError(store.folder, f"no image could be scored: {next(iter(problems.values()), 'there is none')}")
    index = SystemIndex(
        system=system,
        seed=seed,
        rows=rows,
        side=side,
        images=tuple(
            SystemScore(
                sha256=image.sha256,
                first_row=image.first_row,
                rows=image.rows,
                score=scores[number],
                references=tuple(references[number]) if references else (),
            )
            for number, image in enumerate(store.images)
            if number in scores
        ),
        problems=tuple(
            ImageProblem(sha256=store.digests[number], rule=rule) for number, rule in sorted(problems.items())
        ),
    )
    with atomic_path(out / INDEX_FILE) as path:
        path.write_text(index.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


class SystemScores:
    """Scores written by `write_system_scores`, read image by image. Missing or damaged files raise InputError."""

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX_FILE
        self.index = read_record(SystemIndex, path, "an index of a system's scores")
        self._path = folder / MAPS_FILE
        self._start = data_offset(self._path, (self.index.rows, self.index.side, self.index.side))

    @property
    def seed(self) -> int:
        """Return the seed of the system's random choices."""
        return self.index.seed

    @property
    def align_corners(self) -> bool:
        """Return whether the corner patches of a map are at the corner pixels of its crop."""
        return bool(self.index.system.get("align_corners", False))

    @property
    def digests(self) -> Sequence[str]:
        """Return the sha256 of each image, by number."""
        return [image.sha256 for image in self.index.images]

    @property
    def problems(self) -> tuple[ImageProblem, ...]:
        """Return the images that could not be scored."""
        return self.index.problems

    def references(self, i: int) -> tuple[str, ...]:
        """Return the sha256 of the images with which image `i` was compared."""
        return self.index.images[i].references

    def image_score(self, variant: str = ONLY_VARIANT) -> Float64[ndarray, " n"]:
        """Return the score of each image; higher is more anomalous."""
        _require(variant)
        return np.array([image.score for image in self.index.images], dtype=np.float64)

    def patch_map(self, i: int, variant: str = ONLY_VARIANT) -> Float32[ndarray, "C g g"]:
        """Return the maps of image `i`'s crops; higher is more anomalous."""
        _require(variant)
        image, side = self.index.images[i], self.index.side
        count = image.rows * side * side
        with reading(self._path):
            values = np.fromfile(
                self._path, dtype="<f4", count=count, offset=self._start + 4 * image.first_row * side * side
            )
        if len(values) != count:
            raise InputError(self._path, "is cut short")
        return values.reshape(image.rows, side, side)


def _require(variant: str) -> None:
    if variant != ONLY_VARIANT:
        raise ValueError(f"no variant {variant}: these scores have only {ONLY_VARIANT}")
