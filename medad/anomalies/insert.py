"""Insertion of lesions of known shape, contrast and place, in HU, into a healthy liver. The scan is generated or real.

The contrast is added to the scan's own voxels, so a lesion has the noise and the resolution of its surroundings.
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
"""Smallest distances from a lesion to the liver's surface and to another lesion, in standard deviations of the soft
edge. At this distance a neighbour adds less than 0.01 % of its contrast."""
_SHORTEST_AXIS = 0.7
_ARRANGEMENTS = 30
_FEWER_ARRANGEMENTS = 5
_MIN_SHARE_INSIDE = 0.4
"""Smallest share of a sphere at the rim that must lie inside the liver."""
_TRIES_AT_RIM = 200
_CORE_RADIUS, _CORE_WOBBLE, _CORE_BLEND = 0.75, 0.12, 0.12
"""Shape of a mixed lesion, as fractions of its radius: radius of the core, standard deviation of this radius, and width
of the transition to the rim. A core of 0.75 radii has 42 % of the volume."""
_TEXTURE_DIAMETERS = 1 / 8
"""Standard deviation of the Gaussian that blurs the core's wobble, in diameters."""

Voxel = tuple[int, int, int]


@dataclass(frozen=True)
class InsertedLesion:
    """One inserted lesion with exactly known properties.

    Attributes
    ----------
    centre_voxel
        Index of the centre in canonical LPS order.
    diameter_mm
        Longest axis of the ellipsoid. For a lesion at the rim it includes the part outside the liver.
    axes_mm
        All three axes, longest first.
    contrast_hu
        HU added inside the lesion. At the surface it is half of that. A mixed lesion has this contrast in the core and
        the opposite in the rim.
    volume_mm3
        Volume of the ellipsoid, pi / 6 times the product of its axes. At the rim it is the volume of the voxels inside
        the liver.
    """

    centre_voxel: tuple[int, int, int]
    diameter_mm: float
    axes_mm: tuple[float, float, float]
    contrast_hu: float
    volume_mm3: float


@dataclass(frozen=True)
class Inserted:
    """A scan with inserted lesions.

    Attributes
    ----------
    hu
        HU of the scan with lesions.
    number
        Number n (from 1) in voxels with their centre inside lesion n, else 0. At the rim a lesion may be in pieces.
    lesions
        Lesions in the order of their numbers: largest diameter first.
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
    The scan with lesions, the ground truth (liver voxels with their centre inside an ellipsoid), and the lesions.

    Raises
    ------
    InputError
        The liver has no room for that many lesions of that size, and `settings.fit` is `error`.
    """
    diameters = draw_diameters(settings, settings.count, rng)
    inserted = insert_sizes(hu, liver, spacing_mm, diameters, settings, rng, path=path)
    return inserted.hu, inserted.number > 0, inserted.lesions


def draw_diameters(settings: InsertSettings, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw diameters in mm from `settings.diameter_mm`. Log-uniform diameters are equally frequent in every octave."""
    low, high = settings.diameter_mm
    if settings.diameter_distribution == "log_uniform":
        # rounding of exp(log(x)) may leave the range
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
    """Insert ellipsoids of given diameters, each with a random orientation, into a liver.

    The added HU are the contrast times a profile. The profile is 1 inside, 1/2 on the ellipsoid and 0 outside, with a
    Gaussian edge of standard deviation `settings.edge_mm` (a step if 0). Voxels outside the liver do not change. The
    lesions' circumscribed spheres do not touch each other.

    `place="inside"`: every circumscribed sphere lies inside the liver and the volume, away from the surface.
    `place="rim"`: the centre is a liver voxel at the surface, or so near it that the ellipsoid reaches a voxel outside.
    At least 0.4 of the circumscribed sphere is inside. The volume's end does not count as surface.

    `kind="mixed"`: the profile is multiplied by a factor that falls smoothly from 1 in the core to -1 in the rim. A
    random field varies the position of this change.

    Parameters
    ----------
    hu, liver
        Scan and liver in canonical order. They are not changed.
    diameters_mm
        Longest axes. The other axes are 0.7 to 1 times as long.
    settings
        Settings of the insertion: `contrast_hu`, `edge_mm`, `kind`, `place` and `fit` are used. Equal `rng` gives equal
        shapes and places for every contrast and kind.
    path
        File to name in the error.

    Raises
    ------
    InputError
        The liver mask is empty, or `settings.fit` is `error` and the liver has no room for all lesions. With `fewer`,
        the lesions without room in the best of five arrangements are left out.
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
    """Voxels of a liver that may be centres of lesions.

    Attributes
    ----------
    depth_mm
        Distance from each candidate's centre to that of the nearest voxel outside, minus the margin of inside lesions.
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
            raise InputError(path, "lesions cannot be inserted: the liver mask is empty")
        self._box = found[0]
        self._organ = liver[self._box]
        self._spacing_mm = spacing_mm
        self.at_rim = settings.place == "rim"
        # padded with zeros: the volume's end also limits the liver
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
        """Return the largest possible radius at each candidate before any lesion is placed, in mm."""
        return np.full(len(self.depth_mm), np.inf) if self.at_rim else self.depth_mm.copy()

    def pick(self, radius_mm: float, free_mm: NDArray[np.float64], rng: np.random.Generator) -> int | None:
        """Draw a candidate for a sphere if `free_mm` allows one. None: no candidate has room."""
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
        """Return a candidate's index in the volume."""
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
    """Extend a padded organ past the ends of the volume, because its surface there is unknown."""
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
    """Draw centres for spheres of the given radii, largest first, that do not overlap.

    None (only with `fit="fewer"`): the sphere found no room.
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
    largest_mm = max(candidates.widest_mm, 0)
    largest = "" if candidates.at_rim else f"; the largest single lesion that fits has {largest_mm:.3g} mm"
    number = f"{len(radii_mm)} lesion{'s' * (len(radii_mm) > 1)}"
    raise InputError(
        path,
        f"lesions cannot be inserted: no room {'at the rim ' * candidates.at_rim}for {number} of "
        f"{2 * radii_mm[-1]:.3g} to {2 * radii_mm[0]:.3g} mm{largest}",
    )


def _rotation(rng: np.random.Generator) -> Float64[np.ndarray, "3 3"]:
    """Draw a uniformly random rotation: Q of a Gaussian matrix. Signs do not matter for an ellipsoid."""
    return np.linalg.qr(rng.standard_normal((3, 3)))[0]


def _ellipsoid(
    centre: Voxel,
    semi_axes_mm: NDArray[np.float64],
    rotation: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, ...],
    edge_mm: float,
) -> tuple[tuple[slice, ...], NDArray[np.float64], NDArray[np.float64]]:
    """Return a box around an ellipsoid, and each voxel's distance to the surface and relative radius.

    The distance is in mm, negative inside, and correct to first order near the surface. The radius is 0 in the centre
    and 1 on the surface.
    """
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
    """Return a smooth factor: 1 in the core, -1 in the rim."""
    sigma = [diameter_mm * _TEXTURE_DIAMETERS / s for s in spacing_mm]
    field = ndimage.gaussian_filter(rng.standard_normal(radius.shape), sigma)
    field /= field.std() or 1.0
    mixed: NDArray[np.float32] = np.tanh((_CORE_RADIUS - radius + _CORE_WOBBLE * field) / _CORE_BLEND).astype(
        np.float32
    )
    return mixed
