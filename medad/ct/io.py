"""Reading and writing of scans, labels and masks. All other modules read and write volumes through this module.

Arrays in memory are in canonical LPS order: `volume[:, :, z].T` shows an axial slice as radiologists look at it. Files
have their own order. Readers return the source's grid, and writers convert back to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Integer, UInt8
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.base.storage import atomic_path, file_digest, lines_digest
from medad.ct.dicom import read_dicom
from medad.ct.dicom_choice import export_files, is_series, series_digest
from medad.ct.geometry import Geometry, check_same_grid
from medad.ct.itk import METAIMAGE, NRRD, data_files, read_itk
from medad.ct.nifti import AffineFrom, read_nifti, write_nifti
from medad.ct.voxels import HuSink, LabelSink, Sink

__all__ = [
    "AffineFrom",
    "Geometry",
    "Labels",
    "Volume",
    "align_labels",
    "atomic_path",
    "check_hu",
    "check_same_grid",
    "read_labels",
    "read_labels_on",
    "read_scan",
    "require_liver",
    "source_digest",
    "source_files",
    "write_grey",
    "write_hu",
    "write_labels",
    "write_mask",
    "write_probability",
]

NIFTI = (".nii", ".nii.gz")

LIVER_MEDIAN_HU = (-50.0, 250.0)
"""Plausible range of the liver's median. Fatty liver can be below 0 HU, and liver in the portal venous phase reaches
150 HU. Outside this range the scale is wrong."""

LIVER_SPREAD_HU = 2.0
"""Smallest plausible spread of liver values. CT noise already causes 5 HU and more. A smaller spread means that values
are scaled down or constant."""

HU_RANGE = (-32768.0, 32767.0)
"""Range of values that a scanner can store. Metal and padding may reach its ends."""

SCAN_RANGE_HU = 200.0
"""Smallest plausible range of a scan's values. Even one slice of a body reaches from fat (-100) to enhanced tissue
(150)."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan: `hu` in canonical LPS order, finite and not clipped, and the `geometry` of its file."""

    hu: Float32[np.ndarray, "X Y Z"]
    geometry: Geometry
    notes: tuple[str, ...] = ()
    """Sentences about what was assumed or passed over while the files were read."""


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map: whole numbers (uint8 if they fit, else int32) in canonical LPS order, and the `geometry` of its
    file."""

    values: Integer[np.ndarray, "X Y Z"]
    geometry: Geometry


def read_scan(path: Path, *, affine_from: AffineFrom = "agree") -> Volume:
    """Read a CT: .nii, .nii.gz, .mhd, .mha, .nrrd, .nhdr, or a DICOM series.

    A DICOM series is a folder, a zip or a DICOMDIR with one CT series, one of its files, or FOLDER/series-KEY.

    Reading needs little more than 4 bytes of memory per voxel for every file type.

    Parameters
    ----------
    affine_from
        NIfTI affine to use. `"agree"` refuses a file with different sform and qform.

    Raises
    ------
    InputError
        The file cannot be used. The message is one line.
    """
    flat, geometry, notes = _read(path, lambda voxels: HuSink(voxels, path), affine_from)
    return Volume(geometry.to_canonical(flat.reshape(geometry.shape, order="F")), geometry, tuple(notes))


def read_labels(path: Path, *, affine_from: AffineFrom = "agree") -> Labels:
    """Read a label map in any format of a scan except DICOM. Raises InputError."""
    return _read_labels(path, affine_from, need_affine=True)


def read_labels_on(
    scan: Geometry,
    path: Path,
    *,
    affine_from: AffineFrom = "agree",
    affine_mismatch: Literal["error", "warn"] = "error",
) -> tuple[Labels, str | None]:
    """Read a label map and put it on its scan's grid, so that its voxels match those of `Volume.hu`.

    Returns
    -------
    The labels with the scan's geometry, and the text of a warning or None. With `affine_mismatch="warn"`, a label with
    a missing or different affine is matched by voxel index.

    Raises
    ------
    InputError
        The label cannot be read, or lies on another grid.
    """
    labels = _read_labels(path, affine_from, need_affine=affine_mismatch == "error")
    return align_labels(labels, scan, path, affine_mismatch=affine_mismatch)


def align_labels(
    labels: Labels, scan: Geometry, labels_path: Path, *, affine_mismatch: Literal["error", "warn"] = "error"
) -> tuple[Labels, str | None]:
    """Check labels with `check_same_grid` and return them with the scan's geometry, and a warning or None.

    If the affines differ and `"warn"` allows it, voxels correspond by their index in the files. The label's own affine,
    which may have another orientation, is ignored.
    """
    warning = check_same_grid(scan, labels.geometry, labels_path, affine_mismatch=affine_mismatch)
    values = labels.values
    if warning is not None:
        values = scan.to_canonical(labels.geometry.to_source(values))
    return Labels(values, scan), warning


def require_liver(labels: Labels, liver_labels: Sequence[int], path: Path) -> Bool[np.ndarray, "X Y Z"]:
    """Return the liver ROI in canonical order: voxels with one of the values `liver_labels`.

    Raises
    ------
    InputError
        No voxel has such a value. The message lists the values of the label map.
    """
    liver = np.zeros_like(labels.values, dtype=np.bool_)
    for value in liver_labels:
        liver |= labels.values == value
    if not liver.any():
        present = np.unique(labels.values).tolist()
        shown = ", ".join(str(value) for value in present[:12]) + (", ..." if len(present) > 12 else "")
        wanted = " or ".join(str(value) for value in liver_labels)
        raise InputError(path, f"label without liver: no voxel has value {wanted}; values present: {shown}")
    return liver


def check_hu(volume: Volume, liver: Bool[np.ndarray, "X Y Z"], path: Path) -> float:
    """Check by the liver that a scan's values are plausible Hounsfield units. Return the liver's median HU.

    Raises
    ------
    InputError
        The rescale slope or intercept is wrong, or the scan is not a CT. The message shows the values found.
    """
    hu = volume.hu
    low, high = float(hu.min()), float(hu.max())
    if low < HU_RANGE[0] or high > HU_RANGE[1] or high - low < SCAN_RANGE_HU:
        raise InputError(
            path, f"not plausible HU (wrong rescale slope, or not a CT?): values are from {low:.4g} to {high:.4g}"
        )
    # the file's order is the memory's order, which is several times faster
    inside = volume.geometry.to_source(hu).T[volume.geometry.to_source(liver).T]
    tenth, median, ninetieth = (float(value) for value in np.percentile(inside, [10, 50, 90]))
    if not LIVER_MEDIAN_HU[0] <= median <= LIVER_MEDIAN_HU[1]:
        raise InputError(
            path,
            f"not plausible HU (wrong rescale slope?): the liver's median is {median:.4g}, expected "
            f"{LIVER_MEDIAN_HU[0]:g} to {LIVER_MEDIAN_HU[1]:g}",
        )
    if ninetieth - tenth < LIVER_SPREAD_HU:
        raise InputError(
            path,
            f"not plausible HU (wrong rescale slope?): 80 % of the liver's values lie within "
            f"{ninetieth - tenth:.3g} HU, expected at least {LIVER_SPREAD_HU:g}",
        )
    return median


def write_mask(path: Path, mask: Bool[np.ndarray, "X Y Z"], geometry: Geometry) -> None:
    """Write a mask (canonical order) as .nii.gz, uint8 0 and 1, on the source's grid. The file is verified.

    Raises
    ------
    DiskFullError
        The disk is full. No partial file remains.
    """
    write_nifti(path, geometry.to_source(mask), geometry, np.uint8, verify=True)


def write_labels(path: Path, values: Integer[np.ndarray, "X Y Z"], geometry: Geometry) -> None:
    """Write a label map (canonical order) as .nii.gz on the source's grid, with its own type: uint8 or int32."""
    write_nifti(path, geometry.to_source(values), geometry, values.dtype.type, verify=True)


def write_probability(path: Path, probability: Float32[np.ndarray, "X Y Z"], geometry: Geometry) -> None:
    """Write a probability in [0, 1] (canonical order) as float32 .nii.gz on the source's grid. Raises DiskFullError."""
    low, high = float(probability.min()), float(probability.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"probability must lie in [0, 1], found {low} to {high}")
    write_nifti(path, geometry.to_source(probability), geometry, np.float32)


def write_hu(path: Path, hu: Float32[np.ndarray, "X Y Z"], geometry: Geometry) -> None:
    """Write HU (canonical order) as float32 .nii.gz on the source's grid. Raises DiskFullError."""
    write_nifti(path, geometry.to_source(hu), geometry, np.float32)


def write_grey(path: Path, grey: UInt8[np.ndarray, "X Y Z"], geometry: Geometry) -> None:
    """Write grey values (canonical order) as uint8 .nii.gz on the source's grid. Raises DiskFullError."""
    write_nifti(path, geometry.to_source(grey), geometry, np.uint8)


def source_files(path: Path) -> list[Path]:
    """Return the files on which a scan or label depends: a DICOM export's, or an .mhd with its .raw.

    Raises InputError.
    """
    suffix = _suffix(path)
    if suffix in (*METAIMAGE, *NRRD) and path.is_file():
        return data_files(path)
    return export_files(path) if suffix not in NIFTI and is_series(path) else [path]


def source_digest(path: Path) -> str:
    """Return the sha256 (hexadecimal) of a scan's or label's files. File names do not matter.

    For one file it is the digest of the bytes. For several (DICOM, .mhd with .raw) it is the digest of their sorted
    digests. Files beside the slices of a DICOM series do not count. Raises InputError.
    """
    if _suffix(path) not in (*NIFTI, *METAIMAGE, *NRRD) and is_series(path):
        return series_digest(path)
    digests = sorted(file_digest(file) for file in source_files(path))
    return digests[0] if len(digests) == 1 else lines_digest(digests)


def _read_labels(path: Path, affine_from: AffineFrom, *, need_affine: bool) -> Labels:
    if path.is_dir():
        raise InputError(path, "is a folder; a label must be one NIfTI, MetaImage or NRRD file")
    flat, geometry, _ = _read(path, lambda voxels: LabelSink(voxels, path), affine_from, need_affine=need_affine)
    return Labels(geometry.to_canonical(flat.reshape(geometry.shape, order="F")), geometry)


def _read(
    path: Path, sink: Callable[[int], Sink], affine_from: AffineFrom, *, need_affine: bool = True
) -> tuple[NDArray[Any], Geometry, list[str]]:
    suffix, notes = _suffix(path), list[str]()
    if suffix in (*NIFTI, *METAIMAGE, *NRRD) and not path.is_dir():
        if not path.exists():
            raise InputError(path, "no such file or folder")
        if suffix in NIFTI:
            received, geometry = read_nifti(path, sink, affine_from=affine_from, need_affine=need_affine)
        else:
            received, geometry = read_itk(path, sink)
    elif is_series(path):
        received, geometry, notes = read_dicom(path, sink)
    elif not path.exists():
        raise InputError(path, "no such file or folder")
    else:
        raise InputError(path, f"unknown format; expected {', '.join((*NIFTI, *METAIMAGE, *NRRD))} or a DICOM series")
    return received.flat, geometry, notes


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()
