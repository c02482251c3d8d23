"""Small volumes of known geometry, as NIfTI, ITK image and DICOM series."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from tests.medad.ct_series import save_slice

SHAPE = (5, 6, 7)
SPACING = (0.7, 0.9, 2.5)
ORIENTATIONS = [
    (axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
NAMES = [
    "".join("RAS"[a] if s > 0 else "LPI"[a] for a, s in zip(axes, signs, strict=True)) for axes, signs in ORIENTATIONS
]


def tilt(degrees: float) -> NDArray[np.float64]:
    """Return a rotation about an oblique axis, by Rodrigues' formula."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.radians(degrees)
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation


def orientation_affine(axes: tuple[int, ...], signs: tuple[int, ...], degrees: float = 0.0) -> NDArray[np.float64]:
    """Return an affine in which source axis n runs along RAS axis axes[n], in the direction signs[n]."""
    affine = np.eye(4)
    columns = np.zeros((3, 3))
    for source, (ras, sign) in enumerate(zip(axes, signs, strict=True)):
        columns[ras, source] = sign * SPACING[source]
    affine[:3, :3] = tilt(degrees) @ columns
    affine[:3, 3] = (-31.7, 12.25, -804.5)
    return affine


def save(path: Path, array: NDArray[Any], affine: NDArray[np.float64], forms: str = "both") -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_qform(affine, code=1 if forms in ("both", "qform") else 0)
    image.header.set_sform(affine, code=2 if forms in ("both", "sform") else 0)
    nibabel.save(image, path)


def linear_index(shape: tuple[int, ...]) -> NDArray[np.int16]:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def itk_image(axes: Any = (0, 1, 2), signs: Any = (1, 1, 1), degrees: float = 8.0) -> sitk.Image:
    affine = orientation_affine(axes, signs, degrees)
    image = sitk.GetImageFromArray(linear_index((4, 3, 5)))
    image.SetSpacing(SPACING)
    image.SetDirection((affine[:3, :3] / SPACING).ravel().tolist())  # this matrix is in LPS
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def write_slices(
    folder: Path, values: NDArray[np.int16], step: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Write a tilted CT series with slope 2 and intercept -1024, and with file names in shuffled order.

    `values` [slices, rows, columns] in HU must be even. Return origin, row step and column step in LPS mm.
    """
    folder.mkdir()
    row, column, _ = tilt(8).T
    origin = np.array([-100.5, 20.25, 300.0])
    shuffled = np.random.default_rng(0).permutation(len(values))
    for k, pixels in enumerate(values):
        save_slice(
            folder / f"{shuffled[k]:03d}.dcm",
            k,
            ((pixels.astype(np.int32) + 1024) // 2).astype(np.uint16),
            PixelSpacing=[0.9, 0.7],
            SliceThickness=3.0,
            ImageOrientationPatient=[f"{value:.10f}" for value in (*row, *column)],
            ImagePositionPatient=[f"{value:.8f}" for value in origin + k * step],
            RescaleSlope=2,
            RescaleIntercept=-1024,
        )
    return origin, row * 0.7, column * 0.9
