"""Scores of one system on disk: `maps.npy` f32 [R g g], one row a crop, and `system_scores.json`, written last.

Images are named by their digest alone. Maps are written as they come, so memory does not grow with the set.
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
from zsad.clip.feature_store import FeatureStore, data_offset
from zsad.scorers.interface import Scored

MAPS_FILE, INDEX_FILE = "maps.npy", "system_scores.json"
ONLY_VARIANT = "system"
"""The one variant that such scores have."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SystemScore(_Stored):
    """One image."""

    sha256: str
    first_row: int
    rows: int
    score: float
    """Higher is more anomalous."""


class SystemIndex(_Stored):
    """`system_scores.json`."""

    model_config = ConfigDict(populate_by_name=True)

    schema_name: Literal["adflows zsad system scores 1"] = Field(default="adflows zsad system scores 1", alias="schema")
    system: dict[str, Any]
    """The system's settings."""
    seed: int
    side: int
    """g of the maps."""
    images: tuple[SystemScore, ...]


def write_system_scores(
    out: Path, store: FeatureStore, scored: Iterable[Scored], *, system: dict[str, Any], seed: int
) -> None:
    """Write what a system gives, in whatever order, into `out`, made if it is not there.

    Raises
    ------
    ValueError
        An image is missing or comes twice, or a map or score is of a wrong shape or not finite: a bug of the system.
    DiskFullError
        No room left; nothing is left behind.
    """
    rows = sum(image.rows for image in store.images)
    scores: dict[int, float] = {}
    side = 0
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / MAPS_FILE) as path, path.open("wb") as file:
        start = 0
        for one in scored:
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
    if sorted(scores) != list(range(len(store))):
        raise ValueError(f"{len(scores)} of {len(store)} images were scored")
    index = SystemIndex(
        system=system,
        seed=seed,
        side=side,
        images=tuple(
            SystemScore(sha256=image.sha256, first_row=image.first_row, rows=image.rows, score=scores[number])
            for number, image in enumerate(store.images)
        ),
    )
    with atomic_path(out / INDEX_FILE) as path:
        path.write_text(index.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


class SystemScores:
    """What `write_system_scores` wrote, read image by image. Raises InputError where it is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX_FILE
        self.index = read_record(SystemIndex, path, "an index of a system's scores")
        self._path = folder / MAPS_FILE
        side, rows = self.index.side, sum(image.rows for image in self.index.images)
        self._start = data_offset(self._path, (rows, side, side))

    @property
    def seed(self) -> int:
        """Of what the system drew."""
        return self.index.seed

    @property
    def digests(self) -> Sequence[str]:
        """sha256 of each image, by number."""
        return [image.sha256 for image in self.index.images]

    def image_score(self, variant: str = ONLY_VARIANT) -> Float64[ndarray, " n"]:
        """Each image's score; higher is more anomalous."""
        _require(variant)
        return np.array([image.score for image in self.index.images], dtype=np.float64)

    def patch_map(self, i: int, variant: str = ONLY_VARIANT) -> Float32[ndarray, "C g g"]:
        """Maps of image `i`'s crops; higher is more anomalous."""
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
        raise ValueError(f"variant {variant} of scores that have {ONLY_VARIANT} alone")
