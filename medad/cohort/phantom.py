"""Generated abdominal CT, with or without inserted lesions.

The phantom replaces real CT in tests, and in the demo on a machine without a package index. It has the properties that
matter for liver segmentation: fat, muscle, bone and organs with their usual HU, vessels brighter than liver, partial
volume, and noise that is correlated between neighbours. It is not an anatomical atlas.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from medad.anomalies.insert import insert_lesions
from medad.config.liver import InsertSettings
from medad.ct.geometry import Geometry
from medad.ct.nifti import write_nifti

LIVER, TUMOUR = 1, 2
"""Label values of `generate_phantom`, as in LiTS."""

SHAPE = (96, 96, 32)
SPACING_MM = (3.75, 3.75, 5.0)

_BTCV_SPLEEN, _BTCV_RIGHT_KIDNEY, _BTCV_LEFT_KIDNEY, _BTCV_LIVER = 1, 2, 3, 6
_NOISE_HU, _NOISE_SIGMA_VOXELS = 12.0, 0.7
_PORTAL_HU = 45.0


def generate_phantom(
    rng: np.random.Generator,
    shape: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    *,
    lesions: InsertSettings | None = None,
) -> tuple[Float32[np.ndarray, "X Y Z"], UInt8[np.ndarray, "X Y Z"], Float64[np.ndarray, "4 4"]]:
    """Generate a CT of an abdomen in canonical LPS order.

    Parameters
    ----------
    lesions
        Lesions to insert. `rng` draws everything, and their `seed` is not used. None: a healthy liver.

    Returns
    -------
    HU as whole numbers, labels (0, `LIVER`, `TUMOUR`), and the affine to RAS mm.

    Raises
    ------
    InputError
        The lesions do not fit.
    """
    hu, organs, affine = _anatomy(rng, shape, spacing_mm)
    labels = np.where(organs == _BTCV_LIVER, np.uint8(LIVER), np.uint8(0))
    if lesions is not None:
        hu, tumour, _ = insert_lesions(hu, labels == LIVER, spacing_mm, lesions, rng)
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
    """Write `n` healthy phantoms in BTCV layout (liver 6, spleen 1, kidneys 2 and 3), numbered from 1.

    Return the scans.
    """
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
    lesions: InsertSettings | None = InsertSettings(count=2, diameter_mm=(15.0, 30.0)),  # noqa: B008 (frozen)
) -> list[Path]:
    """Write `n` phantoms with tumours in LiTS layout (liver 1, tumour 2), numbered from 0. Return the scans."""
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
    """Structures painted one over the other, in body coordinates.

    u grows to the left and v to the back, both -1..1 at the skin. w grows upwards, -1..1 at the volume's ends.
    """

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
        """Return the inside of an ellipsoid with slightly random place and size. Relative `bumps` move its surface."""
        c = np.array(centre) + self._rng.normal(0, 0.015, 3)
        r = np.array(radii) * self._rng.normal(1, 0.03, 3)
        square = ((self.u - c[0]) / r[0]) ** 2 + ((self.v - c[1]) / r[1]) ** 2 + ((self.w - c[2]) / r[2]) ** 2
        inside: NDArray[np.bool_] = square < (1.0 if bumps is None else 1 + bumps)
        return inside

    def column(self, centre: tuple[float, float], radius: float) -> Bool[np.ndarray, "X Y Z"]:
        """Return the inside of an upright circular cylinder. `radius` is a fraction of the body's half depth."""
        across = (self.u - centre[0]) * self.half_mm[0]
        deep = (self.v - centre[1]) * self.half_mm[1]
        inside: NDArray[np.bool_] = np.hypot(across, deep) < radius * self.half_mm[1]
        return np.broadcast_to(inside, self.shape)

    def smooth_field(self, scale_mm: float) -> Float32[np.ndarray, "X Y Z"]:
        """Return a random field of mean 0 and sd 1 that changes over `scale_mm`. It is interpolated coarse noise."""
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
    """Return HU, organs with BTCV's label values, and the affine."""
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
    """Brighten two vessel trees: the portal one from the liver's middle, and the hepatic one from its back."""
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
    """Return points every 2 mm along a binary tree, and the vessel's radius at each point, in mm."""
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
