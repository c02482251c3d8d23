"""The grid of a volume: voxel order of the file, affine to patient space, and conversion to canonical LPS order.

Affines map voxel indices to patient millimetres in RAS+, as in NIfTI and nibabel: x grows to the right, y to anterior,
z to superior. Canonical voxel order is LPS for every source file: the first index grows to the patient's left, the
second to posterior, the third to superior. Oblique grids stay oblique. Axes are permuted and flipped to the nearest
patient axis, and voxels are never resampled.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from medad.base.errors import InputError

GRID_TOLERANCE_VOXELS = 0.05
"""Largest distance, in voxels, between the corners of two grids that count as equal. Rounding of DICOM decimal strings
and float32 affines moves corners by less than 0.01 voxel. Half a voxel would already blur a lesion's edge."""

ROUNDING_TOLERANCE_VOXELS = 0.501
"""Largest distance, in voxels, at which a label's grid is taken for the scan's grid with a rounded header. The nearest
voxel of the scan is then the one of the same index. It is half a voxel and the rounding of float32."""

SHEAR_TOLERANCE = 1e-3
"""Largest cosine of the angle between two voxel axes that counts as a right angle (0.06 degrees off)."""

SPACING_TOLERANCE = 1e-3
"""Largest relative difference between two statements of the same voxel size."""

VOXEL_SIZE_MM = (0.05, 25.0)
"""Smallest and largest plausible voxel size of a CT along an axis. Other sizes are mistakes, such as metres."""

_LPS = (-1, -1, 1)


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a source file.

    Attributes
    ----------
    shape
        Number of voxels along the source's axes.
    affine
        4 x 4 float64: source voxel index -> RAS mm.
    nifti
        Raw geometry fields of the NIfTI header. Outputs copy them bit for bit. None: another format.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    nifti: Mapping[str, Any] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Geometry) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """Return a text from which `from_json` restores an equal geometry, with all floats bit for bit."""
        nifti = None if self.nifti is None else dict(self.nifti)
        return json.dumps({"shape": list(self.shape), "affine": self.affine.tolist(), "nifti": nifti})

    @classmethod
    def from_json(cls, text: str) -> Geometry:
        """Restore a geometry from the text of `to_json`."""
        values = json.loads(text)
        x, y, z = values["shape"]
        return cls((x, y, z), np.array(values["affine"], dtype=np.float64), values["nifti"])

    @functools.cached_property
    def _axes(self) -> tuple[tuple[int, bool], ...]:
        """Return for each canonical axis its source axis, and whether that axis is reversed."""
        orientation = nibabel.orientations.io_orientation(self.affine)
        found = {int(ras): (source, int(sign)) for source, (ras, sign) in enumerate(orientation)}
        return tuple((found[axis][0], found[axis][1] != _LPS[axis]) for axis in range(3))

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """Return the number of voxels along left, posterior, superior."""
        (x, _), (y, _), (z, _) = self._axes
        return self.shape[x], self.shape[y], self.shape[z]

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """Return the 4 x 4 affine: canonical voxel index -> RAS mm."""
        result = self.affine.copy()
        for axis, (source, reverse) in enumerate(self._axes):
            column = self.affine[:3, source]
            result[:3, axis] = -column if reverse else column
            if reverse:
                result[:3, 3] += column * (self.shape[source] - 1)
        return result

    @property
    def canonical_spacing_mm(self) -> tuple[float, float, float]:
        """Return the voxel size along left, posterior, superior, in mm."""
        x, y, z = np.linalg.norm(self.canonical_affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def voxel_mm3(self) -> float:
        """Return the volume of one voxel, in mm³."""
        return abs(float(np.linalg.det(self.affine[:3, :3])))

    def to_canonical(self, array_source: Shaped[np.ndarray, "I J K"]) -> Shaped[np.ndarray, "X Y Z"]:
        """Return a view of `array_source` (source order) in canonical LPS order. Nothing is copied."""
        if array_source.shape != self.shape:
            raise ValueError(f"array of shape {array_source.shape} is not on the source grid {self.shape}")
        view = array_source.transpose([source for source, _ in self._axes])
        return view[self._reversal]

    def to_source(self, array_canonical: Shaped[np.ndarray, "X Y Z"]) -> Shaped[np.ndarray, "I J K"]:
        """Return a view of `array_canonical` (canonical LPS order) in the source's order. Nothing is copied."""
        if array_canonical.shape != self.canonical_shape:
            raise ValueError(f"array of shape {array_canonical.shape} is not on the canonical {self.canonical_shape}")
        back = np.argsort([source for source, _ in self._axes])
        return array_canonical[self._reversal].transpose(back)

    @property
    def _reversal(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if reverse else 1) for _, reverse in self._axes)


def check_affine(affine: NDArray[np.float64], path: Path) -> None:
    """Check that an affine is a scaled rotation: finite, plausible voxel sizes, no shear. Raises InputError."""
    if not np.isfinite(affine).all():
        raise InputError(path, "the affine contains NaN or infinite values")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing <= 0).any():
        raise InputError(path, f"voxel size must be above 0 mm along every axis, found {_triple(spacing)}")
    low, high = VOXEL_SIZE_MM
    if spacing.min() < low * (1 - SPACING_TOLERANCE) or spacing.max() > high * (1 + SPACING_TOLERANCE):
        rule = f"voxel size must be {low:g} to {high:g} mm along every axis, found {_triple(spacing)}"
        raise InputError(path, f"{rule}; the header is wrong")
    axes = affine[:3, :3] / spacing
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine > SHEAR_TOLERANCE:
        angle = np.degrees(np.arccos(min(cosine, 1.0)))
        raise InputError(
            path, f"the affine is sheared: two voxel axes meet at {angle:.2f} degrees, not 90; resample the scan first"
        )


def grid_distance_voxels(first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, int, int]) -> float:
    """Return the largest shift of a grid corner between two affines, along one axis, in voxels of the first affine."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((-0.5, n - 0.5) for n in shape))]).T
    try:
        moved = np.linalg.solve(first, second @ corners)
    except np.linalg.LinAlgError:
        return float("inf")
    return float(np.abs(moved - corners).max())


def advice(setting: str, value: str) -> str:
    """Return what a user types to read a header in another way: for a file, for a data set, and for an inbox."""
    number = value.split()  # of an option with several values
    given = value if len(number) == 1 else f"[{','.join(number)}]"
    return (
        f"--{setting.replace('_', '-')} {value} (data set: --set test_data.{setting}={given}, or train_data; "
        f"inbox: --set {setting}={given})"
    )


@dataclass(frozen=True)
class GridMatch:
    """The place of a label's voxels in its scan, and the text of a warning or None.

    `by_index`: voxels correspond by their index in the files, and the label's affine is ignored. Else they correspond
    in canonical order, and the label's first voxel is the scan's voxel `offset`.
    """

    warning: str | None = None
    by_index: bool = False
    offset: tuple[int, int, int] = (0, 0, 0)


def match_grids(
    scan: Geometry, labels: Geometry, labels_path: Path, *, affine_mismatch: Literal["error", "warn"] = "error"
) -> GridMatch:
    """Find the scan's voxel of each voxel of a label. The two files may have different axis orders.

    The label has the scan's grid, or a part of it that was cut out along whole voxels. Headers may be rounded by up to
    `ROUNDING_TOLERANCE_VOXELS`, which gives a warning.

    Parameters
    ----------
    affine_mismatch
        `"error"` refuses grids at different places. `"warn"` accepts them if the files have the same shape. Voxels then
        correspond by their index in the files.

    Raises
    ------
    InputError
        The shapes differ, or the grids are further apart.
    """
    size = labels.canonical_shape
    if scan.canonical_shape == size:
        distance = grid_distance_voxels(scan.canonical_affine, labels.canonical_affine, size)
        if distance <= ROUNDING_TOLERANCE_VOXELS:
            return GridMatch(_rounded(distance))
    elif (part := _part_of(scan, labels)) is not None:
        return part
    if scan.shape != labels.shape:
        if scan.canonical_shape == size:
            raise InputError(labels_path, f"affine differs from the scan's by {distance:.3g} voxels")
        raise InputError(
            labels_path, f"shape mismatch: the label has {_times(labels.shape)} voxels, the scan {_times(scan.shape)}"
        )
    distance = grid_distance_voxels(scan.affine, labels.affine, scan.shape)
    rule = f"affine mismatch: the label's grid is up to {distance:.3g} voxels away from the scan's grid"
    if affine_mismatch == "warn":
        return GridMatch(f"{rule}; voxels were matched by their index", by_index=True)
    allowed = f"{rule} (allowed: {ROUNDING_TOLERANCE_VOXELS:.1g})"
    raise InputError(labels_path, f"{allowed}; to match voxels by index, type {advice('affine_mismatch', 'warn')}")


def _rounded(distance: float) -> str | None:
    if distance <= GRID_TOLERANCE_VOXELS:
        return None
    return (
        f"the header of the label is rounded: its grid is up to {distance:.2g} voxels away from the scan's grid; "
        "voxels were matched by their index"
    )


def _part_of(scan: Geometry, labels: Geometry) -> GridMatch | None:
    """Return the place of a label that covers a part of its scan's grid. None: it is on another grid."""
    first = np.linalg.solve(scan.canonical_affine, labels.canonical_affine[:, 3])[:3]
    offset = np.rint(first).astype(int)
    x, y, z = offset.tolist()
    if (offset < 0).any() or (offset + labels.canonical_shape > scan.canonical_shape).any():
        return None
    moved = scan.canonical_affine.copy()
    moved[:, 3] = scan.canonical_affine @ [x, y, z, 1]
    distance = grid_distance_voxels(moved, labels.canonical_affine, labels.canonical_shape)
    if distance > ROUNDING_TOLERANCE_VOXELS:
        return None
    sizes = f"{_times(labels.canonical_shape)} of the scan's {_times(scan.canonical_shape)} voxels"
    notes = [f"the label covers {sizes}; the others count as unlabelled", _rounded(distance)]
    return GridMatch("; ".join(note for note in notes if note), offset=(x, y, z))


def _triple(values: NDArray[np.float64]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
