"""Prepared slices as a stack of planes of similar thickness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Shaped
from numpy import ndarray

from medad.classifier.features import LiverStack
from medad.slices.prepared_file import PreparedCase
from medad.slices.stack import fill_planes

PLANE_MM = 2.5
"""Distance between planes to which thinner planes are averaged in groups. Thinner planes would only take time."""


@dataclass(frozen=True)
class Stacking:
    """The way from the slices of a case to a stack of consecutive planes, and back.

    Attributes
    ----------
    z
        Plane numbers of the slices, ascending.
    group
        Number of neighbouring planes that are averaged.
    """

    z: Int[ndarray, " N"]
    group: int

    @classmethod
    def of(cls, case: PreparedCase) -> Stacking:
        """Return the stacking of a case: planes are averaged so that they are about `PLANE_MM` apart."""
        return cls(case.slices.z, max(1, round(PLANE_MM / case.spacing_mm[2])))

    def stack(self, case: PreparedCase) -> LiverStack:
        """Return the liver of a case. Its slices must be linear in HU."""
        assert case.grey_per_hu is not None
        x_mm, y_mm, z_mm = case.spacing_mm
        organ = case.slices.organ
        hu = case.slices.pixels.astype(np.float32) / np.float32(case.grey_per_hu)
        hu -= np.median(hu[organ])
        weight = self.mean(organ.astype(np.float32))
        total = self.mean(np.where(organ, hu, np.float32(0)))
        inside = weight > 0
        mean = total / np.where(inside, weight, np.float32(1))
        return LiverStack(mean, inside, (z_mm * self.group, y_mm, x_mm))

    def mean(self, values: Shaped[ndarray, "N S S"]) -> Float32[ndarray, "P S S"]:
        """Return the mean of each group of planes. A plane without a slice counts as zero."""
        planes = fill_planes(values, self.z)
        if self.group == 1:
            return planes.astype(np.float32)
        starts = np.arange(0, len(planes), self.group)
        size = np.diff([*starts, len(planes)]).astype(np.float32)
        return np.asarray(np.add.reduceat(planes, starts, axis=0, dtype=np.float32) / size[:, None, None])

    def to_slices(self, values: Float32[ndarray, "P S S"]) -> Float32[ndarray, "N S S"]:
        """Return the values of each slice: those of its group."""
        return np.asarray(values[(self.z - self.z[0]) // self.group])
