"""A torso by construction: lungs, heart, liver, spleen, stomach, kidneys, spine, muscle and fat as ellipsoids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medad.ct.geometry import Geometry

SIZE_MM = (360.0, 280.0, 320.0)


@dataclass(frozen=True, eq=False)
class Torso:
    """HU in canonical LPS order, the true liver and other organs, and the grid."""

    hu: NDArray[np.float32]
    organs: dict[str, NDArray[np.bool_]]
    spacing_mm: tuple[float, float, float]

    @property
    def liver(self) -> NDArray[np.bool_]:
        return self.organs["liver"]

    @property
    def geometry(self) -> Geometry:
        x, y, z = self.hu.shape
        return Geometry((x, y, z), np.diag([-self.spacing_mm[0], -self.spacing_mm[1], self.spacing_mm[2], 1.0]))

    def planes(self, first: int, last: int) -> Torso:
        """Return a part of the scan."""
        organs = {name: mask[:, :, first:last] for name, mask in self.organs.items()}
        return Torso(np.ascontiguousarray(self.hu[:, :, first:last]), organs, self.spacing_mm)


def make_torso(spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0), seed: int = 0, liver_hu: float = 105) -> Torso:
    """Make a torso. The patient's right is at small x, the front at small y, the head at large z."""
    shape = tuple(round(size / step) for size, step in zip(SIZE_MM, spacing_mm, strict=True))
    x, y, z = np.meshgrid(
        *((np.arange(n) + 0.5) * step - size / 2 for n, step, size in zip(shape, spacing_mm, SIZE_MM, strict=True)),
        indexing="ij",
    )
    z = z + SIZE_MM[2] / 2

    def ball(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> NDArray[np.bool_]:
        (a, b, c), (p, q, r) = centre, radii
        inside: NDArray[np.bool_] = ((x - a) / p) ** 2 + ((y - b) / q) ** 2 + ((z - c) / r) ** 2 < 1
        return inside

    across = np.hypot(x / 160, y / 115)
    hu = np.full(shape, -1000.0, np.float32)
    hu[across < 1] = -100
    hu[across < 0.9] = 55
    cavity = across < 0.8
    hu[cavity] = -95
    rng = np.random.default_rng(seed)
    bowel = ndimage.gaussian_filter(rng.standard_normal(shape), [12 / step for step in spacing_mm])
    hu[cavity & (z < 130) & (bowel > bowel.std() * 0.3)] = 35
    chest = cavity & (z > 170 + 25 * np.cos(x / 60))
    liver = (ball((-75, 0, 150), (62, 85, 78)) | ball((5, -40, 172), (65, 42, 34))) & cavity & (z < 225)
    lungs = chest & ~liver & (np.abs(x) > 18)
    hu[chest] = 40
    hu[lungs] = -850
    organs = {
        "heart": ball((25, -35, 250), (55, 48, 48)) & cavity & ~liver,
        "liver": liver,
        "spleen": ball((95, 45, 165), (28, 40, 45)) & cavity & ~liver,
        "stomach": ball((62, -35, 150), (42, 40, 45)) & cavity & ~liver,
        "right kidney": ball((-60, 62, 75), (26, 26, 50)) & cavity,
        "left kidney": ball((60, 62, 85), (26, 26, 50)) & cavity,
    }
    for name, value in (
        ("heart", 150), ("spleen", 118), ("stomach", 25), ("right kidney", 170), ("left kidney", 170),
        ("liver", liver_hu),
    ):  # fmt: skip
        hu[organs[name]] = value
    organs["right kidney"] &= ~liver
    hu[np.hypot(x + 0, y - 70) < 20] = 300
    hu[np.hypot(x - 15, y - 42) < 10] = 160
    hu[(across > 0.82) & (across < 0.87) & (np.sin(z / 5) > 0.3) & (z > 100)] = 250
    hu = ndimage.gaussian_filter(hu, [2 / step for step in spacing_mm])
    hu += ndimage.gaussian_filter(rng.standard_normal(shape), 0.6).astype(np.float32) * 15
    return Torso(np.clip(np.rint(hu), -1024, 1500).astype(np.float32), organs, spacing_mm)
