"""Writing of a DICOM CT series without patient data, for samples and tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from medad.ct.geometry import check_affine
from medad.ct.itk import silence_itk_warnings


def write_dicom(folder: Path, hu: NDArray[np.floating], affine: NDArray[np.float64]) -> None:
    """Write a CT series without patient data into an existing empty folder, one file per slice.

    Equal content gives equal DICOM identifiers.

    Parameters
    ----------
    hu
        Shape (columns, rows, slices). Values are rounded to whole HU, -32768..32767.
    affine
        4 x 4, voxel -> RAS mm, without shear.
    """
    check_affine(affine, folder)
    digest = hashlib.sha256(np.ascontiguousarray(hu).tobytes() + affine.tobytes()).digest()
    root = f"2.25.{int.from_bytes(digest[:12], 'big')}"  # UIDs made from a number: DICOM PS3.5, annex B.2
    lps = affine.copy()
    lps[:2] *= -1
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    series_tags = {
        "0008|0060": "CT",
        "0020|000e": f"{root}.1",
        "0020|000d": root,  # study
        "0020|0052": f"{root}.2",  # frame of reference
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2",  # CT image storage
        "0020|0037": _decimals(axes[:, :2].T.ravel()),
        "0018|0050": _decimals(spacing[2:]),
        "0028|1053": "1",
        "0028|1052": "0",
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    silence_itk_warnings()
    for index in range(hu.shape[2]):
        image = sitk.GetImageFromArray(np.rint(hu[:, :, index].T)[None].astype(np.int16))
        image.SetSpacing([float(value) for value in spacing])
        slice_tags = {
            "0020|0032": _decimals(lps[:3, :3] @ [0, 0, index] + lps[:3, 3]),
            "0020|0013": str(index + 1),
            "0008|0018": f"{root}.3.{index + 1}",
        }
        for tag, value in (series_tags | slice_tags).items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"slice{index + 1:04d}.dcm"))
        writer.Execute(image)


def _decimals(values: NDArray[np.float64]) -> str:
    """Format values as DICOM decimal strings, which have at most 16 characters."""
    return "\\".join(f"{value:.9g}" for value in values)
