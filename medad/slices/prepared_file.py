"""The safetensors file of a prepared case: its slices, the scan's grid and the liver."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16, UInt8
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medad.base.boxes import bounding_box
from medad.base.errors import InputError
from medad.ct.io import Geometry
from medad.slices.grid import SliceGrid, Slices, empty_volume

PREPARED = "prepared.safetensors"
"""Name of this file in the folder of a prepared case."""
FORMAT, METADATA, LIVER_HU = "adflows-prepared-2", "adflows", "liver_hu"


@dataclass(frozen=True)
class PreparedCase:
    """A case after preprocessing.

    Attributes
    ----------
    slices
        Slices for the networks.
    geometry
        Grid of the scan.
    liver
        Liver mask on that grid. None: it was not requested.
    grey_per_hu
        Number of grey values per HU. None: the grey values are not linear in HU.
    liver_hu
        HU of the liver's voxels in index order, without window. Whole numbers up to 2048 are exact, and values up to
        256 within 0.07. None: they were not requested or not stored.
    """

    slices: Slices
    geometry: Geometry
    liver: Bool[ndarray, "X Y Z"] | None
    grey_per_hu: float | None
    liver_hu: Float16[ndarray, " V"] | None = None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Return the size of a pixel along x and y and the distance between planes, in mm."""
        x, y, z = self.geometry.canonical_spacing_mm
        grid = self.slices.grid
        return x * grid.side / grid.size_px, y * grid.side / grid.size_px, z


def save_prepared(
    path: Path,
    slices: Slices,
    geometry: Geometry,
    liver: Bool[ndarray, "X Y Z"],
    grey_per_hu: float | None = None,
    liver_hu: Float16[ndarray, " V"] | None = None,
) -> None:
    """Write slices, geometry and the liver mask (its bounding box, one bit per voxel) as safetensors.

    `liver_hu` contains the HU of the mask's voxels in index order.
    """
    box = bounding_box(liver) or (slice(0, 0),) * 3
    metadata = {
        "format": FORMAT,
        "grid": asdict(slices.grid),
        "geometry": geometry.to_json(),
        "grey_per_hu": grey_per_hu,
        "liver_box": [*(part.start for part in box), *(part.stop - part.start for part in box)],
    }
    arrays = {
        "pixels": np.ascontiguousarray(slices.pixels),
        "organ": slices.organ.astype(np.uint8),
        "z": slices.z,
        "liver_bits": np.packbits(liver[box], axis=None),
    }
    if liver_hu is not None:
        arrays[LIVER_HU] = liver_hu
    # one metadata entry: safetensors writes several in random order, but equal slices must give equal bytes
    save_file(arrays, path, {METADATA: json.dumps(metadata)})


def load_prepared(path: Path, *, with_liver: bool = False) -> PreparedCase:
    """Read what `save_prepared` wrote.

    Raises
    ------
    InputError
        The file is missing, damaged, or not a file of prepared slices.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if metadata.get("format") != FORMAT:
                raise InputError(path, f"expected prepared slices ({FORMAT})")
            slices = Slices(
                file.get_tensor("pixels"),
                file.get_tensor("organ").astype(bool),
                file.get_tensor("z"),
                _grid_from(metadata["grid"]),
            )
            liver_hu = file.get_tensor(LIVER_HU) if with_liver and LIVER_HU in file.keys() else None  # noqa: SIM118
            liver = _unpack(file.get_tensor("liver_bits"), metadata["liver_box"], slices.grid) if with_liver else None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(path, f"prepared slices cannot be read ({error})") from error
    return PreparedCase(slices, Geometry.from_json(metadata["geometry"]), liver, metadata["grey_per_hu"], liver_hu)


def _grid_from(values: dict[str, Any]) -> SliceGrid:
    frame = values["frame"]
    return SliceGrid(
        (values["plane_xy"][0], values["plane_xy"][1]),
        values["depth"],
        values["size_px"],
        None if frame is None else (frame[0], frame[1], frame[2], frame[3]),
        values["frame_side"],
    )


def _unpack(bits: UInt8[ndarray, " K"], place: list[int], grid: SliceGrid) -> Bool[ndarray, "X Y Z"]:
    x, y, z, nx, ny, nz = place
    liver = empty_volume(grid, np.bool_)
    box = np.unpackbits(bits, count=nx * ny * nz).astype(bool).reshape(nx, ny, nz)
    liver[x : x + nx, y : y + ny, z : z + nz] = box
    return liver
