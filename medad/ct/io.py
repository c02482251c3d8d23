"""Reading and writing of scans, labels and masks. All other modules read and write volumes through this module.

Arrays in memory are in canonical LPS order: `volume[:, :, z].T` shows an axial slice as radiologists look at it. Files
have their own order. Readers return the source's grid, and writers convert back to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Integer, UInt8

from medad.base.errors import InputError
from medad.base.storage import atomic_path, file_digest, lines_digest
from medad.ct.dicom import read_dicom
from medad.ct.dicom_choice import export_files, is_series, series_digest
from medad.ct.geometry import Geometry, match_grids
from medad.ct.itk import METAIMAGE, NRRD, data_files, read_itk
from medad.ct.masks import mask_file, read_dicom_mask, read_seg_nrrd
from medad.ct.nifti import IDENTITY_NOTE, AffineFrom, Spacing, is_identity, read_nifti, write_nifti
from medad.ct.padding import check_padding, clear_padding, is_padded
from medad.ct.voxels import HuSink, LabelSink, SinkT

__all__ = [
    "AffineFrom",
    "Geometry",
    "Labels",
    "Spacing",
    "Volume",
    "align_labels",
    "atomic_path",
    "check_padding",
    "read_labels",
    "read_labels_on",
    "read_scan",
    "source_digest",
    "source_files",
    "write_grey",
    "write_hu",
    "write_labels",
    "write_mask",
    "write_probability",
]

NIFTI = (".nii", ".nii.gz")
_VOLUMES = (*NIFTI, *METAIMAGE, *NRRD)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan: `hu` in canonical LPS order, finite and not clipped, and the `geometry` of its file."""

    hu: Float32[np.ndarray, "X Y Z"]
    geometry: Geometry
    notes: tuple[str, ...] = ()
    """Sentences about what was assumed or passed over while the files were read."""
    cleared: Bool[np.ndarray, "X Y Z"] | None = None
    """Voxels outside the body that had no measurement and were set to air. None: there were none."""


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map: whole numbers (uint8 if they fit, else int32) in canonical LPS order, and the `geometry` of its
    file."""

    values: Integer[np.ndarray, "X Y Z"]
    geometry: Geometry
    notes: tuple[str, ...] = ()
    """Sentences about what was assumed while the file was read."""


def read_scan(path: Path, *, affine_from: AffineFrom = "agree", spacing_mm: Spacing | None = None) -> Volume:
    """Read a CT: .nii, .nii.gz, .mhd, .mha, .nrrd, .nhdr, or a DICOM series.

    A DICOM series is a folder, a zip or a DICOMDIR with one CT series, one of its files, or FOLDER/series-KEY.

    Reading needs little more than 4 bytes of memory per voxel for every file type.

    Parameters
    ----------
    affine_from
        NIfTI affine to use. `"agree"` refuses a file with different sform and qform.
    spacing_mm
        Voxel size along the axes of a NIfTI file whose affine is missing or the identity.

    Raises
    ------
    InputError
        The file cannot be used. The message is one line.
    """
    sink, geometry, notes = _read(path, HuSink, affine_from, spacing_mm)
    hu = geometry.to_canonical(sink.flat.reshape(geometry.shape, order="F"))
    if geometry.nifti is not None and spacing_mm is None and is_identity(geometry.affine):
        notes.append(IDENTITY_NOTE)
    cleared = None
    if is_padded(sink.missing, sink.odd, hu.size, path):
        cleared, more = clear_padding(hu, path)
        notes += more
    return Volume(hu, geometry, tuple(notes), cleared)


def read_labels(path: Path, *, affine_from: AffineFrom = "agree", spacing_mm: Spacing | None = None) -> Labels:
    """Read a label map: .nii, .nii.gz, .mhd, .mha, .nrrd or .nhdr, with the values of the file. Raises InputError."""
    return _read_labels(path, affine_from, spacing_mm, need_affine=True)


def read_labels_on(
    scan: Geometry,
    path: Path,
    *,
    affine_from: AffineFrom = "agree",
    affine_mismatch: Literal["error", "warn"] = "error",
    spacing_mm: Spacing | None = None,
    liver_labels: Sequence[int] = (),
) -> tuple[Labels, str | None]:
    """Read a label map and put it on its scan's grid, so that its voxels match those of `Volume.hu`.

    Formats are those of `read_labels`, a .seg.nrrd of 3D Slicer, and a DICOM SEG or RTSTRUCT (the file, or a folder
    with nothing else).

    Parameters
    ----------
    liver_labels
        Values of liver that will be looked for, or none. A file that names its segments is read accordingly, as
        `medad.ct.segments.choose_segments` describes.

    Returns
    -------
    The labels with the scan's geometry, and the text of a warning or None. With `affine_mismatch="warn"`, a label with
    a missing or different affine is matched by voxel index.

    Raises
    ------
    InputError
        The label cannot be read, or lies on another grid.
    """
    if _suffix(path) in NRRD and path.is_file() and (named := read_seg_nrrd(path, liver_labels)) is not None:
        values, geometry = named
        labels = Labels(geometry.to_canonical(values), geometry)
    elif _suffix(path) not in _VOLUMES and (mask := mask_file(path)) is not None:
        values, notes = read_dicom_mask(mask, scan, liver_labels)
        return Labels(values, scan), "; ".join(notes) or None
    else:
        labels = _read_labels(path, affine_from, spacing_mm, need_affine=affine_mismatch == "error")
    return align_labels(labels, scan, path, affine_mismatch=affine_mismatch)


def align_labels(
    labels: Labels, scan: Geometry, labels_path: Path, *, affine_mismatch: Literal["error", "warn"] = "error"
) -> tuple[Labels, str | None]:
    """Put labels on the scan's grid as `match_grids` says. Return them with the scan's geometry, and a warning or None.

    If the affines differ and `"warn"` allows it, voxels correspond by their index in the files. The label's own affine,
    which may have another orientation, is ignored. Raises InputError.
    """
    match = match_grids(scan, labels.geometry, labels_path, affine_mismatch=affine_mismatch)
    values = labels.values
    if match.by_index:
        values = scan.to_canonical(labels.geometry.to_source(values))
    elif values.shape != scan.canonical_shape:
        whole = scan.to_canonical(np.zeros(scan.shape, values.dtype, order="F"))
        whole[tuple(slice(first, first + n) for first, n in zip(match.offset, values.shape, strict=True))] = values
        values = whole
    return Labels(values, scan, labels.notes), match.warning


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
    if suffix in NIFTI or not is_series(path):
        return [path]
    mask = mask_file(path)
    return export_files(path) if mask is None else [mask]


def source_digest(path: Path) -> str:
    """Return the sha256 (hexadecimal) of a scan's or label's files. File names do not matter.

    For one file it is the digest of the bytes. For several (DICOM, .mhd with .raw) it is the digest of their sorted
    digests. Files beside the slices of a DICOM series do not count. Raises InputError.
    """
    if _suffix(path) not in _VOLUMES and is_series(path) and mask_file(path) is None:
        return series_digest(path)
    digests = sorted(file_digest(file) for file in source_files(path))
    return digests[0] if len(digests) == 1 else lines_digest(digests)


def _read_labels(path: Path, affine_from: AffineFrom, spacing_mm: Spacing | None, *, need_affine: bool) -> Labels:
    suffix = _suffix(path)
    if path.is_dir() or (suffix not in _VOLUMES and path.exists()):
        found = "is a folder with other content" if path.is_dir() else "is not a mask"
        if not path.is_dir() and is_series(path):
            found = "is a DICOM file of another kind"
        raise InputError(
            path, f"{found}; a label must be one NIfTI, MetaImage or NRRD file, or a DICOM SEG or RTSTRUCT"
        )
    sink, geometry, notes = _read(
        path, lambda voxels: LabelSink(voxels, path), affine_from, spacing_mm, need_affine=need_affine
    )
    values = geometry.to_canonical(sink.flat.reshape(geometry.shape, order="F"))
    return Labels(values, geometry, tuple(notes))


def _read(
    path: Path,
    sink: Callable[[int], SinkT],
    affine_from: AffineFrom,
    spacing_mm: Spacing | None,
    *,
    need_affine: bool = True,
) -> tuple[SinkT, Geometry, list[str]]:
    suffix, notes = _suffix(path), list[str]()
    if suffix in _VOLUMES and not path.is_dir():
        if not path.exists():
            raise InputError(path, "no such file or folder")
        if suffix in NIFTI:
            received, geometry, notes = read_nifti(
                path, sink, affine_from=affine_from, spacing_mm=spacing_mm, need_affine=need_affine
            )
        else:
            received, geometry = read_itk(path, sink)
    elif is_series(path):
        received, geometry, notes = read_dicom(path, sink)
    elif not path.exists():
        raise InputError(path, "no such file or folder")
    else:
        raise InputError(path, f"unknown format; expected {', '.join(_VOLUMES)} or a DICOM series")
    return received, geometry, notes


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()
