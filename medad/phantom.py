"""Generated abdominal CT, and lesions of known shape planted into any liver, generated or real.

The phantom stands in for real CT where none may be had: tests, and the demo on a machine without a registry. It has
what liver segmentation meets: fat, muscle, bone and organs of their usual HU, vessels brighter than liver, partial
volume and noise that is correlated between neighbours. It is no anatomical atlas.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.special import erfc

from medad.config import PlantSettings
from medad.errors import InputError
from medad.geometry import Geometry
from medad.nifti import write_nifti

LIVER, TUMOUR = 1, 2
"""Label values of `generate_phantom`, as in LiTS."""

SHAPE = (96, 96, 32)
SPACING_MM = (3.75, 3.75, 5.0)

_BTCV_SPLEEN, _BTCV_RIGHT_KIDNEY, _BTCV_LEFT_KIDNEY, _BTCV_LIVER = 1, 2, 3, 6
_MARGIN_EDGES, _GAP_EDGES = 2.0, 4.0
"""Least distance from a lesion to the liver's surface, and to another lesion, in standard deviations of the soft
edge: a neighbour adds less than 0.01 % of its contrast."""
_SHORTEST_AXIS = 0.7
_ARRANGEMENTS = 30
_NOISE_HU, _NOISE_SIGMA_VOXELS = 12.0, 0.7
_PORTAL_HU = 45.0


@dataclass(frozen=True)
class PlantedLesion:
    """One planted lesion, exact by construction.

    Attributes
    ----------
    centre_voxel
        Index in canonical LPS order.
    diameter_mm
        Longest axis of the ellipsoid.
    axes_mm
        All three axes, longest first.
    contrast_hu
        HU added well inside; half of it at the surface.
    volume_mm3
        Of the ellipsoid, pi / 6 times the product of its axes.
    """

    centre_voxel: tuple[int, int, int]
    diameter_mm: float
    axes_mm: tuple[float, float, float]
    contrast_hu: float
    volume_mm3: float


def plant(
    hu: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    settings: PlantSettings,
    rng: np.random.Generator,
    *,
    path: Path = Path("liver"),
) -> tuple[Float32[np.ndarray, "X Y Z"], Bool[np.ndarray, "X Y Z"], list[PlantedLesion]]:
    """Plant ellipsoids of random orientation into a liver.

    Every lesion's circumscribed sphere lies inside the liver and the volume, clear of the surface and of the other
    lesions. Contrast times a profile is added: 1 inside, 0 outside, a Gaussian-softened edge of standard deviation
    `settings.edge_mm` between (a step if 0), one half on the ellipsoid. Nothing changes outside the liver.

    Parameters
    ----------
    hu, liver
        Scan and liver, canonical order; left as they are.
    path
        Named in the error.

    Returns
    -------
    The scan with lesions, the truth (voxels whose centre is inside an ellipsoid), and the lesions.

    Raises
    ------
    InputError
        The liver has no room for as many lesions of that size.
    """
    diameters = np.sort(rng.uniform(*settings.diameter_mm, size=settings.count))[::-1]
    centres = _arrange(liver, spacing_mm, diameters / 2, settings.edge_mm, rng, path)
    planted, truth, lesions = hu.copy(), np.zeros(hu.shape, dtype=np.bool_), []
    for centre, diameter in zip(centres, diameters, strict=True):
        ratios = np.sort(rng.uniform(_SHORTEST_AXIS, 1.0, size=2))[::-1]
        axes = float(diameter) * np.array([1.0, *ratios])
        contrast = float(rng.uniform(*settings.contrast_hu))
        box, offset = _ellipsoid_offset(centre, axes / 2, _rotation(rng), spacing_mm, hu.shape, settings.edge_mm)
        profile = (offset <= 0).astype(np.float32)
        if settings.edge_mm > 0:
            profile = (erfc(offset / (np.sqrt(2) * settings.edge_mm)) / 2).astype(np.float32)
        planted[box] += np.float32(contrast) * profile * liver[box]
        truth[box] |= offset <= 0
        lesions.append(
            PlantedLesion(
                centre_voxel=centre,
                diameter_mm=float(axes[0]),
                axes_mm=(float(axes[0]), float(axes[1]), float(axes[2])),
                contrast_hu=contrast,
                volume_mm3=float(pi / 6 * axes.prod()),
            )
        )
    return planted, truth, lesions


def _arrange(
    liver: Bool[np.ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    radii_mm: NDArray[np.float64],
    edge_mm: float,
    rng: np.random.Generator,
    path: Path,
) -> list[tuple[int, int, int]]:
    """Centres for spheres of the given radii, largest first; the order of drawing is random, the result exact."""
    found = ndimage.find_objects(liver.astype(np.uint8))
    if not found:
        raise InputError(path, "lesions cannot be planted: there is no liver")
    box = found[0]
    # a rim of zeros: the volume's end bounds the liver too
    inside = np.pad(liver[box], 1)
    depth_mm = ndimage.distance_transform_edt(inside, sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    depth_mm -= _MARGIN_EDGES * edge_mm
    candidates = np.argwhere(depth_mm > radii_mm[-1])
    depth = depth_mm[tuple(candidates.T)]
    positions = candidates * np.array(spacing_mm)
    origin = [axis.start for axis in box]
    widest = 2 * float(depth_mm.max())
    for _ in range(_ARRANGEMENTS):
        chosen: list[int] = []
        free = depth.copy()  # the widest radius at each place, beside surface and lesions
        for radius in radii_mm:
            fitting = np.flatnonzero(free > radius)
            if fitting.size == 0:
                break
            pick = int(rng.choice(fitting))
            chosen.append(pick)
            apart = np.linalg.norm(positions - positions[pick], axis=1)
            np.minimum(free, apart - radius - _GAP_EDGES * edge_mm, out=free)
        else:
            x, y, z = (candidates[chosen] + origin).T.tolist()
            return list(zip(x, y, z, strict=True))
    raise InputError(
        path,
        f"lesions cannot be planted: no room for {len(radii_mm)} of {2 * radii_mm[-1]:.3g} to {2 * radii_mm[0]:.3g} "
        f"mm; the widest that fits alone is {max(widest, 0):.3g} mm",
    )


def _rotation(rng: np.random.Generator) -> Float64[np.ndarray, "3 3"]:
    """Uniform over rotations (Q of a Gaussian matrix; the signs do not matter to an ellipsoid)."""
    return np.linalg.qr(rng.standard_normal((3, 3)))[0]


def _ellipsoid_offset(
    centre: tuple[int, int, int],
    semi_axes_mm: NDArray[np.float64],
    rotation: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, ...],
    edge_mm: float,
) -> tuple[tuple[slice, ...], NDArray[np.float64]]:
    """A box around an ellipsoid, and each voxel's distance to its surface, mm: negative inside, first order off it."""
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
    return tuple(slice(*b) for b in bounds), distance


def generate_phantom(
    rng: np.random.Generator,
    shape: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    *,
    lesions: PlantSettings | None = None,
) -> tuple[Float32[np.ndarray, "X Y Z"], UInt8[np.ndarray, "X Y Z"], Float64[np.ndarray, "4 4"]]:
    """A CT of an abdomen, canonical LPS order.

    Parameters
    ----------
    lesions
        Plant these (their `seed` is not used: `rng` draws everything). None: a healthy liver.

    Returns
    -------
    HU, whole numbers; labels (0, `LIVER`, `TUMOUR`); affine to RAS mm.

    Raises
    ------
    InputError
        The lesions do not fit.
    """
    hu, organs, affine = _anatomy(rng, shape, spacing_mm)
    labels = np.where(organs == _BTCV_LIVER, np.uint8(LIVER), np.uint8(0))
    if lesions is not None:
        hu, tumour, _ = plant(hu, labels == LIVER, spacing_mm, lesions, rng)
        labels[tumour] = TUMOUR
    return np.rint(hu), labels, affine


def write_btcv_phantoms(
    root: Path,
    n: int,
    seed: int = 0,
    *,
    shape: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
) -> list[Path]:
    """Healthy phantoms in BTCV layout (liver 6, spleen 1, kidneys 2 and 3), numbered from 1; returns the scans."""
    (root / "img").mkdir(parents=True, exist_ok=True)
    (root / "label").mkdir(parents=True, exist_ok=True)
    scans = []
    for number in range(1, n + 1):
        hu, organs, affine = _anatomy(np.random.default_rng([seed, number]), shape, spacing_mm)
        scan = root / "img" / f"img{number:04d}.nii.gz"
        _write_pair(scan, root / "label" / f"label{number:04d}.nii.gz", hu, organs, affine)
        scans.append(scan)
    return scans


def write_lits_phantoms(
    root: Path,
    n: int,
    seed: int = 0,
    *,
    shape: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    lesions: PlantSettings | None = PlantSettings(count=2, diameter_mm=(15.0, 30.0)),  # noqa: B008 (frozen)
) -> list[Path]:
    """Phantoms with tumours in LiTS layout (liver 1, tumour 2), numbered from 0; returns the scans."""
    root.mkdir(parents=True, exist_ok=True)
    scans = []
    for number in range(n):
        hu, labels, affine = generate_phantom(
            np.random.default_rng([seed, number, 1]), shape, spacing_mm, lesions=lesions
        )
        scan = root / f"volume-{number}.nii.gz"
        _write_pair(scan, root / f"segmentation-{number}.nii.gz", hu, labels, affine)
        scans.append(scan)
    return scans


def _write_pair(
    scan: Path, label: Path, hu: NDArray[np.float32], labels: NDArray[np.uint8], affine: NDArray[np.float64]
) -> None:
    geometry = Geometry((hu.shape[0], hu.shape[1], hu.shape[2]), affine)
    write_nifti(scan, np.rint(hu), geometry, np.int16)
    write_nifti(label, labels, geometry, np.uint8)


class _Canvas:
    """Structures painted over one another, in body coordinates: u to the left and v to the back, both -1..1 at the
    skin, w upwards, -1..1 at the volume's ends."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]):
        x, y, z = (
            ((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip(shape, spacing_mm, strict=True)
        )
        self._rng = rng
        self.half_mm = (0.46 * shape[0] * spacing_mm[0], 0.36 * shape[1] * spacing_mm[1], shape[2] * spacing_mm[2] / 2)
        self.u = (x / self.half_mm[0])[:, None, None]
        self.v = (y / self.half_mm[1])[None, :, None]
        self.w = (z / self.half_mm[2])[None, None, :]
        self.spacing_mm = np.array(spacing_mm)
        self.shape = shape

    def ellipsoid(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], bumps: NDArray[np.floating] | None
    ) -> Bool[np.ndarray, "X Y Z"]:
        """Inside an ellipsoid whose place and size vary a little, its surface moved by `bumps` (relative)."""
        c = np.array(centre) + self._rng.normal(0, 0.015, 3)
        r = np.array(radii) * self._rng.normal(1, 0.03, 3)
        square = ((self.u - c[0]) / r[0]) ** 2 + ((self.v - c[1]) / r[1]) ** 2 + ((self.w - c[2]) / r[2]) ** 2
        inside: NDArray[np.bool_] = square < (1.0 if bumps is None else 1 + bumps)
        return inside

    def column(self, centre: tuple[float, float], radius: float) -> Bool[np.ndarray, "X Y Z"]:
        """Inside an upright circular cylinder; `radius` as a fraction of the body's half depth."""
        across = (self.u - centre[0]) * self.half_mm[0]
        deep = (self.v - centre[1]) * self.half_mm[1]
        inside: NDArray[np.bool_] = np.hypot(across, deep) < radius * self.half_mm[1]
        return np.broadcast_to(inside, self.shape)

    def smooth_field(self, scale_mm: float) -> Float32[np.ndarray, "X Y Z"]:
        """A random field of mean 0 and sd 1 that changes over `scale_mm`: coarse noise, interpolated."""
        size_mm = np.array(self.shape) * self.spacing_mm
        coarse = self._rng.standard_normal(np.ceil(size_mm / scale_mm).astype(int) + 3).astype(np.float32)
        index = [np.arange(n) * s / scale_mm + 1 for n, s in zip(self.shape, self.spacing_mm, strict=True)]
        field: NDArray[np.float32] = coarse
        for axis, where in enumerate(index):  # linear, one axis after another
            low = np.floor(where).astype(int)
            part = (where - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            field = np.take(field, low, axis) * (1 - part) + np.take(field, low + 1, axis) * part
        field /= field.std()
        return field


def _anatomy(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64]]:
    """HU, organs with BTCV's label values, affine."""
    canvas = _Canvas(rng, shape, spacing_mm)
    bumps = np.float32(0.12) * canvas.smooth_field(60.0)
    hu = np.full(shape, -1000, dtype=np.float32)
    organs = np.zeros(shape, dtype=np.uint8)
    depth = np.broadcast_to(canvas.u**2 + canvas.v**2, shape)
    hu[depth < 1] = -105
    hu[depth < 0.82] = 55
    inner = depth < 0.66
    bowel = canvas.smooth_field(25.0)
    hu[inner] = np.where(bowel[inner] > 0.4, 30, -95)
    hu[inner & (bowel > 1.9) & (canvas.v < 0)] = -700

    def paint(where: NDArray[np.bool_], mean_hu: float, label: int = 0) -> None:
        hu[where] = mean_hu
        organs[where] = label

    paint(canvas.ellipsoid((0.42, -0.35, 0.5), (0.25, 0.28, 0.6), bumps) & inner, 25.0)
    paint(canvas.ellipsoid((0.62, 0.22, 0.35), (0.16, 0.3, 0.5), bumps) & inner, 115.0, _BTCV_SPLEEN)
    for side, label in ((-0.42, _BTCV_RIGHT_KIDNEY), (0.42, _BTCV_LEFT_KIDNEY)):
        kidney = canvas.ellipsoid((side, 0.42, -0.45), (0.13, 0.2, 0.5), None) & inner
        paint(kidney, 180.0, label)
    liver = canvas.ellipsoid((-0.4, -0.05, 0.1), (0.4, 0.58, 1.0), bumps)
    liver |= canvas.ellipsoid((0.02, -0.38, 0.3), (0.4, 0.24, 0.6), bumps)
    liver &= inner & (organs == 0)
    liver &= ~canvas.column((0.0, 0.5), 0.3)
    liver_hu = float(rng.normal(105, 5))
    paint(liver, liver_hu, _BTCV_LIVER)
    hu[liver] += 3 * canvas.smooth_field(40.0)[liver]
    _paint_vessels(rng, canvas, hu, liver)
    paint(canvas.column((0.06, 0.22), 0.07), 150.0)
    paint(canvas.column((-0.12, 0.22), 0.08), liver_hu + 20)
    paint(canvas.column((0.0, 0.52), 0.19), 450.0)
    paint(canvas.column((0.0, 0.52), 0.16), 180.0)
    paint(canvas.column((0.0, 0.76), 0.07), 25.0)
    hu = ndimage.gaussian_filter(hu, 0.5)  # partial volume
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), _NOISE_SIGMA_VOXELS)
    hu += noise * (_NOISE_HU / noise.std())
    np.clip(hu, -1024, 3071, out=hu)
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return hu, organs, affine


def _paint_vessels(
    rng: np.random.Generator, canvas: _Canvas, hu: NDArray[np.float32], liver: NDArray[np.bool_]
) -> None:
    """Brighten two trees of vessels, portal and hepatic, that branch from the liver's middle and its back."""
    voxels = np.argwhere(liver)
    if len(voxels) == 0:
        return
    places = voxels * canvas.spacing_mm
    middle = places.mean(axis=0)
    size_mm = float(np.cbrt(len(voxels) * canvas.spacing_mm.prod()))
    for root, brightness in ((middle, _PORTAL_HU), (middle + size_mm * np.array([0.2, 0.3, 0.3]), 35.0)):
        points, radii = _branches(rng, root, size_mm)
        distance, nearest = cKDTree(points).query(places, distance_upper_bound=float(radii.max()))
        close = np.isfinite(distance)
        hit = voxels[close][distance[close] < radii[nearest[close]]]
        hu[tuple(hit.T)] += brightness


def _branches(
    rng: np.random.Generator, root: NDArray[np.float64], size_mm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points every 2 mm along a binary tree, each with the vessel's radius there, mm."""
    points, radii = [], []
    tips = [(root, direction / np.linalg.norm(direction), 6.0) for direction in rng.standard_normal((3, 3))]
    while tips:
        start, direction, radius = tips.pop()
        steps = max(2, int(size_mm * 0.09 * radius / 2))
        for _ in range(steps):
            direction = direction + rng.normal(0, 0.1, 3)
            direction = direction / np.linalg.norm(direction)
            start = start + 2 * direction
            points.append(start)
            radii.append(radius)
        if radius > 2:
            for _ in range(2):
                turned = direction + rng.normal(0, 0.6, 3)
                tips.append((start, turned / np.linalg.norm(turned), radius * 0.75))
    return np.array(points), np.array(radii)
