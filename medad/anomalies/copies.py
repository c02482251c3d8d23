"""The cached step that draws lesions in three dimensions for copies of a prepared healthy scan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medad.anomalies.solid_lesions import draw_solid_lesions
from medad.base.errors import ConfigError, InputError
from medad.config.anomalies import SolidLesionSettings
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.slices.stack import fill_planes

COPIES = "copies.safetensors"
NO_SHIFT = 128
"""Stored value of a voxel to which nothing is added."""


@dataclass(frozen=True)
class LesionCopies:
    """Lesions of all copies of a scan, on its slices.

    Attributes
    ----------
    shift
        Grey values to add, plus `NO_SHIFT`.
    mask
        Voxels inside lesions.
    """

    shift: UInt8[ndarray, "K N S S"]
    mask: Bool[ndarray, "K N S S"]


def write_copies(prepared: Path, settings: SolidLesionSettings, seed: int, out: Path) -> None:
    """Draw the lesions of `settings.copies` copies of a prepared healthy case, and write copies.safetensors.

    The lesions depend on `seed` and on the organ's voxels.

    Raises ConfigError if the slices were equalised: their grey values are not linear in HU.
    """
    case = load_prepared(prepared / PREPARED)
    if case.grey_per_hu is None:
        raise ConfigError("lesions in HU need slices prepared with preprocess.equalise: false")
    organ = fill_planes(case.slices.organ, case.slices.z)
    planes = case.slices.z - case.slices.z[0]
    shifts, masks = [], []
    content = int(np.packbits(case.slices.organ).astype(np.uint64).sum())
    for copy in range(settings.copies):
        rng = np.random.default_rng([seed, content, copy])
        lesions = draw_solid_lesions(organ, case.spacing_mm, settings, rng)
        grey = np.rint(lesions.shift_hu[planes] * case.grey_per_hu)
        shifts.append(np.clip(grey + NO_SHIFT, 0, 255).astype(np.uint8))
        masks.append(lesions.mask[planes])
    arrays = {"shift": np.stack(shifts), "mask": np.packbits(np.stack(masks), axis=-1)}
    save_file(arrays, out / COPIES)


def load_copies(folder: Path, only: slice = slice(None)) -> LesionCopies:
    """Read what `write_copies` wrote. `only` selects copies in a row; those that do not exist are left out.

    Raises InputError for a missing or damaged file.
    """
    path = folder / COPIES
    try:
        with safe_open(path, framework="numpy") as file:
            shift, mask = file.get_slice("shift"), file.get_slice("mask")
            first, last, _ = only.indices(shift.get_shape()[0])
            shift, mask = shift[first:last], mask[first:last]
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(path, f"copies with lesions cannot be read ({error})") from error
    return LesionCopies(shift, np.unpackbits(mask, axis=-1, count=shift.shape[-1]).astype(bool))
