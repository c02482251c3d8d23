"""Receivers of voxels in slabs. They check and convert each slab, so that memory never contains the raw volume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.ct.padding import is_odd, is_stored

LABEL_TOLERANCE = 1e-2
"""Largest distance from an integer at which a label value counts as that integer. A scan's scaling (slope 3e-5) in a
label's header turns 1 into 1.000015. Interpolated labels have any value."""


class Sink(ABC):
    """Receiver of voxels in the file's order. `flat` is the result."""

    flat: NDArray[Any]

    @abstractmethod
    def put(self, start: int, values: NDArray[Any]) -> None:
        """Store the flat array `values`, which begins at voxel `start`. Raises InputError."""


SinkT = TypeVar("SinkT", bound=Sink)


class HuSink(Sink):
    """Receiver of HU as float32. It counts voxels that are `missing` (not finite) and `odd` (not as scanners write)."""

    def __init__(self, voxels: int) -> None:
        self.flat = np.empty(voxels, dtype=np.float32)
        self.missing = self.odd = 0

    def put(self, start: int, values: NDArray[Any]) -> None:
        part = self.flat[start : start + values.size]
        with np.errstate(over="ignore", invalid="ignore"):
            part[...] = values
        # minimum and maximum propagate NaN and need no array of flags
        if not is_stored(float(part.min()), float(part.max())):
            finite = np.isfinite(part)
            self.missing += part.size - int(np.count_nonzero(finite))
            self.odd += int(np.count_nonzero(finite & is_odd(part)))


class LabelSink(Sink):
    """Receiver of label values: whole numbers, uint8 if they fit, else int32."""

    def __init__(self, voxels: int, path: Path) -> None:
        self.flat: NDArray[Any] = np.empty(voxels, dtype=np.uint8)
        self._path = path

    def put(self, start: int, values: NDArray[Any]) -> None:
        low, high = values.min(), values.max()
        if not np.isfinite([low, high]).all():
            raise InputError(self._path, "label values are NaN or infinite")
        if values.dtype.kind == "f":
            rounded = np.rint(values)
            off = np.abs(values - rounded)
            worst = int(off.argmax())
            if off[worst] > LABEL_TOLERANCE:
                raise InputError(self._path, f"label values must be whole numbers, found {values[worst]:.6g}")
            values, low, high = rounded, rounded.min(), rounded.max()
        if low < np.iinfo(np.int32).min or high > np.iinfo(np.int32).max:
            raise InputError(self._path, f"label values reach from {low} to {high}, beyond 32 bits")
        if self.flat.dtype == np.uint8 and (low < 0 or high > 255):
            wide = np.empty(self.flat.size, dtype=np.int32)
            wide[:start] = self.flat[:start]
            self.flat = wide
        self.flat[start : start + values.size] = values
