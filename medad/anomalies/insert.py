"""Lesions of known shape, contrast and place, inserted in HU into a healthy liver, generated or real.

What is added is added to the scan's own voxels, so a lesion has the noise and the resolution of its surroundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int16
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import erfc

from medad.base.errors import InputError
from medad.config.liver import InsertSettings

_MARGIN_EDGES, _GAP_EDGES = 2.0, 4.0
"""Least distance from a lesion to the liver's surface, and to another lesion, in standard deviations of the soft
edge: a neighbour adds less than 0.01 % of its contrast."""
_SHORTEST_AXIS = 0.7
_ARRANGEMENTS = 30
_FEWER_ARRANGEMENTS = 5
_MIN_SHARE_INSIDE = 0.4
"""Of a sphere at the rim, the share that is to lie inside the liver."""
_TRIES_AT_RIM = 200
_CORE_RADIUS, _CORE_WOBBLE, _CORE_BLEND = 0.75, 0.12, 0.12
"""Of a mixed lesion, as fractions of its radius: where core becomes rim, how far that wanders (standard deviation),
how wide the change is. A core of 0.75 radii has 42 % of the volume."""
_TEXTURE_DIAMETERS = 1 / 8
"""Standard deviation of the Gaussian that the core's wobble is blurred with, in diameters."""

Voxel = tuple[int, int, int]


@dataclass(frozen=True)
class InsertedLesion:
    """One inserted lesion, exact by construction.

    Attributes
    ----------
    centre_voxel
        Index in canonical LPS order.
    diameter_mm
        Longest axis of the ellipsoid, of a lesion at the rim with the part outside the liver.
    axes_mm
        All three axes, longest first.
    contrast_hu
        HU added well inside; half of it at the surface. Of a mixed lesion: in the core, and the opposite in the rim.
    volume_mm3
        Of the ellipsoid, pi / 6 times the product of its axes. At the rim: of its voxels inside the liver.
    """

    centre_voxel: tuple[int, int, int]
    diameter_mm: float
    axes_mm: tuple[float, float, float]
    contrast_hu: float
    volume_mm3: float


@dataclass(frozen=True)
class Inserted:
    """A scan with lesions.

    Attributes
    ----------
    hu
        The scan.
    number
        0, or n in the voxels whose centre is inside lesion n, counted from 1. At the rim a lesion may be in pieces.
    lesions
        In the order of their numbers: largest diameter first.
    """

    hu: Float32[np.ndarray, "X Y Z"]
    number: Int16[np.ndarray, "X Y Z"]
    lesions: list[InsertedLesion]


def insert_lesions(
    hu: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    settings: InsertSettings,
    rng: np.random.Generator,
    *,
    path: Path = Path("liver"),
) -> tuple[Float32[np.ndarray, "X Y Z"], Bool[np.ndarray, "X Y Z"], list[InsertedLesion]]:
    """Insert ellipsoids of random size and orientation into a liver; see `insert_sizes`.

    Returns
    -------
    The scan with lesions, the truth (voxels of the liver whose centre is inside an ellipsoid), and the lesions.

    Raises
    ------
    InputError
        The liver has no room for as many lesions of that size, and `settings.fit` is `error`.
    """
    diameters = draw_diameters(settings, settings.count, rng)
    inserted = insert_sizes(hu, liver, spacing_mm, diameters, settings, rng, path=path)
    return inserted.hu, inserted.number > 0, inserted.lesions


def draw_diameters(settings: InsertSettings, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Diameters in mm from `settings.diameter_mm`; log-uniform ones have as many small as large lesions an octave."""
    low, high = settings.diameter_mm
    if settings.diameter_distribution == "log_uniform":
        # exp(log(x)) may leave the range by a rounding
        return np.clip(np.exp(rng.uniform(np.log(low), np.log(high), size=count)), low, high)
    return rng.uniform(low, high, size=count)


def insert_sizes(
    hu: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    diameters_mm: Sequence[float] | NDArray[np.float64],
    settings: InsertSettings,
    rng: np.random.Generator,
    *,
    path: Path = Path("liver"),
) -> Inserted:
    """Insert ellipsoids of given diameters, each in another random orientation, into a liver.

    Contrast times a profile is added: 1 inside, 0 outside, a Gaussian-softened edge of standard deviation
    `settings.edge_mm` between (a step if 0), one half on the ellipsoid. Nothing changes outside the liver. Spheres
    around the lesions are clear of each other.

    `place="inside"`: every circumscribed sphere lies inside the liver and the volume, clear of the surface.
    `place="rim"`: the centre is inside the liver and so near its surface that the ellipsoid reaches a voxel outside it,
    or is a voxel at the surface; at least 0.4 of the circumscribed sphere is inside. The volume's end is no surface.

    `kind="mixed"`: the profile is multiplied by a number that falls smoothly from 1 in the core to -1 in the rim; where
    it does so wanders with a random field.

    Parameters
    ----------
    hu, liver
        Scan and liver, canonical order; left as they are.
    diameters_mm
        Longest axes; the others are 0.7 to 1 of them.
    settings
        `contrast_hu`, `edge_mm`, `kind`, `place` and `fit` are used. Equal `rng` gives equal shapes and places whatever
        contrast and kind are.
    path
        Named in the error.

    Raises
    ------
    InputError
        There is no liver; or, if `settings.fit` is `error`, no room for all. Otherwise the lesions that found no room
        in the best of five arrangements are missing.
    """
    wanted = np.sort(np.asarray(diameters_mm, dtype=np.float64))[::-1]
    centres = _place_spheres(liver, spacing_mm, wanted / 2, settings, rng, path)
    fitting = [(centre, diameter) for centre, diameter in zip(centres, wanted, strict=True) if centre is not None]
    shapes = []
    for centre, diameter in fitting:
        ratios = np.sort(rng.uniform(_SHORTEST_AXIS, 1.0, size=2))[::-1]
        axes = float(diameter) * np.array([1.0, *ratios])
        contrast = float(rng.uniform(*settings.contrast_hu))
        shapes.append((centre, axes, contrast, _rotation(rng)))
    inserted, number, lesions = hu.copy(), np.zeros(hu.shape, dtype=np.int16), []
    for count, (centre, axes, contrast, rotation) in enumerate(shapes, start=1):
        box, offset, radius = _ellipsoid(centre, axes / 2, rotation, spacing_mm, hu.shape, settings.edge_mm)
        profile = (offset <= 0).astype(np.float32)
        if settings.edge_mm > 0:
            profile = (erfc(offset / (np.sqrt(2) * settings.edge_mm)) / 2).astype(np.float32)
        if settings.kind == "mixed":
            profile *= _core_and_rim(radius, float(axes[0]), spacing_mm, rng)
        inserted[box] += np.float32(contrast) * profile * liver[box]
        inside = (offset <= 0) & liver[box]
        number[box][inside] = count
        volume_mm3 = float(pi / 6 * axes.prod())
        if settings.place == "rim":
            volume_mm3 = float(np.count_nonzero(inside) * np.prod(spacing_mm))
        lesions.append(
            InsertedLesion(
                centre_voxel=centre,
                diameter_mm=float(axes[0]),
                axes_mm=(float(axes[0]), float(axes[1]), float(axes[2])),
                contrast_hu=contrast,
                volume_mm3=volume_mm3,
            )
        )
    return Inserted(inserted, number, lesions)


class _CandidateCentres:
    """Where in a liver lesions may have their centres.

    Attributes
    ----------
    depth_mm
        Of each candidate: from its centre to that of the nearest voxel outside, less the margin of lesions inside.
    """

    def __init__(
        self,
        liver: Bool[np.ndarray, "X Y Z"],
        spacing_mm: tuple[float, float, float],
        radii_mm: NDArray[np.float64],
        settings: InsertSettings,
        path: Path,
    ) -> None:
        found = ndimage.find_objects(liver.astype(np.uint8))
        if not found:
            raise InputError(path, "lesions cannot be inserted: there is no liver")
        self._box = found[0]
        self._organ = liver[self._box]
        self._spacing_mm = spacing_mm
        self.at_rim = settings.place == "rim"
        # a rim of zeros: the volume's end bounds the liver too
        inside = np.pad(self._organ, 1)
        if self.at_rim:
            _extend_past_volume_ends(inside, self._box, liver.shape)
        if inside.all():
            depth_mm = np.full(self._organ.shape, np.inf)
        else:
            depth_mm = ndimage.distance_transform_edt(inside, sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
        if not self.at_rim:
            depth_mm -= _MARGIN_EDGES * settings.edge_mm
        self.widest_mm = 2 * float(depth_mm.max())
        self._reach_mm = max(_SHORTEST_AXIS * float(radii_mm[0]), min(spacing_mm))
        chosen = (depth_mm <= self._reach_mm) & self._organ if self.at_rim else depth_mm > radii_mm[-1]
        self._candidates = np.argwhere(chosen)
        self.depth_mm = depth_mm[tuple(self._candidates.T)]
        self.positions_mm = self._candidates * np.array(spacing_mm)

    def initial_free_mm(self) -> NDArray[np.float64]:
        """The widest radius at each candidate before any lesion is placed, mm."""
        return np.full(len(self.depth_mm), np.inf) if self.at_rim else self.depth_mm.copy()

    def pick(self, radius_mm: float, free_mm: NDArray[np.float64], rng: np.random.Generator) -> int | None:
        """A candidate for a sphere where `free_mm` allows it; None where there is none."""
        fits = free_mm > radius_mm
        if self.at_rim:
            fits &= self.depth_mm <= max(_SHORTEST_AXIS * radius_mm, min(self._spacing_mm))
        fitting = np.flatnonzero(fits)
        for _ in range(min(_TRIES_AT_RIM, fitting.size)):
            pick = int(rng.choice(fitting))
            if not self.at_rim or self._share_inside(pick, radius_mm) >= _MIN_SHARE_INSIDE:
                return pick
        return None

    def voxel(self, pick: int) -> Voxel:
        """A candidate's index in the volume."""
        x, y, z = (int(at + axis.start) for at, axis in zip(self._candidates[pick], self._box, strict=True))
        return x, y, z

    def _share_inside(self, pick: int, radius_mm: float) -> float:
        centre = self._candidates[pick]
        reach = [int(np.ceil(radius_mm / s)) for s in self._spacing_mm]
        bounds = [
            (max(0, int(c) - r), min(n, int(c) + r + 1))
            for c, r, n in zip(centre, reach, self._organ.shape, strict=True)
        ]
        squares = [((np.arange(*b) - c) * s) ** 2 for b, c, s in zip(bounds, centre, self._spacing_mm, strict=True)]
        within = squares[0][:, None, None] + squares[1][None, :, None] + squares[2] <= radius_mm**2
        voxels = np.count_nonzero(within & self._organ[tuple(slice(*b) for b in bounds)])
        return float(voxels * np.prod(self._spacing_mm) / (4 / 3 * pi * radius_mm**3))


def _extend_past_volume_ends(inside: NDArray[np.bool_], box: tuple[slice, ...], shape: tuple[int, ...]) -> None:
    """Let a padded organ go on where the volume ends: there nobody knows where its surface is."""
    for axis, (part, length) in enumerate(zip(box, shape, strict=True)):
        planes = np.moveaxis(inside, axis, 0)
        if part.start == 0:
            planes[0] = planes[1]
        if part.stop == length:
            planes[-1] = planes[-2]


def _place_spheres(
    liver: Bool[np.ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    radii_mm: NDArray[np.float64],
    settings: InsertSettings,
    rng: np.random.Generator,
    path: Path,
) -> list[Voxel | None]:
    """Centres for spheres of the given radii, largest first; the order of drawing is random, the result exact.

    None, with `fit="fewer"` alone, for a sphere without room.
    """
    candidates = _CandidateCentres(liver, spacing_mm, radii_mm, settings, path)
    fewer = settings.fit == "fewer"
    best: list[Voxel | None] = [None] * len(radii_mm)
    for _ in range(_FEWER_ARRANGEMENTS if fewer else _ARRANGEMENTS):
        placed: list[Voxel | None] = []
        free = candidates.initial_free_mm()
        for radius in radii_mm:
            pick = candidates.pick(float(radius), free, rng)
            if pick is None:
                if not fewer:
                    break
                placed.append(None)
                continue
            placed.append(candidates.voxel(pick))
            distance_mm = np.linalg.norm(candidates.positions_mm - candidates.positions_mm[pick], axis=1)
            np.minimum(free, distance_mm - radius - _GAP_EDGES * settings.edge_mm, out=free)
        if len(placed) == len(radii_mm) and placed.count(None) <= best.count(None):
            best = placed
            if None not in placed:
                return placed
    if fewer:
        return best
    alone = "" if candidates.at_rim else f"; the widest that fits alone is {max(candidates.widest_mm, 0):.3g} mm"
    raise InputError(
        path,
        f"lesions cannot be inserted: no room {'at the rim ' * candidates.at_rim}for {len(radii_mm)} of "
        f"{2 * radii_mm[-1]:.3g} to {2 * radii_mm[0]:.3g} mm{alone}",
    )


def _rotation(rng: np.random.Generator) -> Float64[np.ndarray, "3 3"]:
    """Uniform over rotations (Q of a Gaussian matrix; the signs do not matter to an ellipsoid)."""
    return np.linalg.qr(rng.standard_normal((3, 3)))[0]


def _ellipsoid(
    centre: Voxel,
    semi_axes_mm: NDArray[np.float64],
    rotation: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, ...],
    edge_mm: float,
) -> tuple[tuple[slice, ...], NDArray[np.float64], NDArray[np.float64]]:
    """A box around an ellipsoid; each voxel's distance to its surface, mm, negative inside, first order off it; and
    its radius, 0 in the centre and 1 on the surface."""
    reach = semi_axes_mm[0] + 4 * edge_mm
    bounds = [
        (max(0, int(np.floor(c - reach / s))), min(n, int(np.ceil(c + reach / s)) + 1))
        for c, s, n in zip(centre, spacing_mm, shape, strict=True)
    ]
    axes = [(np.arange(*b) - c) * s for b, c, s in zip(bounds, centre, spacing_mm, strict=True)]
    scaled = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) @ rotation / semi_axes_mm
    radius = np.linalg.norm(scaled, axis=-1)
    slope = np.linalg.norm(scaled / semi_axes_mm, axis=-1)
    with np.errstate(invalid="ignore"):
        distance = np.where(radius > 0, (radius - 1) * radius / slope, -semi_axes_mm.min())
    return tuple(slice(*b) for b in bounds), distance, radius


def _core_and_rim(
    radius: NDArray[np.float64], diameter_mm: float, spacing_mm: tuple[float, float, float], rng: np.random.Generator
) -> NDArray[np.float32]:
    """1 in the core, -1 in the rim, smooth between."""
    sigma = [diameter_mm * _TEXTURE_DIAMETERS / s for s in spacing_mm]
    field = ndimage.gaussian_filter(rng.standard_normal(radius.shape), sigma)
    field /= field.std() or 1.0
    mixed: NDArray[np.float32] = np.tanh((_CORE_RADIUS - radius + _CORE_WOBBLE * field) / _CORE_BLEND).astype(
        np.float32
    )
    return mixed
