"""Reading and writing of NIfTI files. Voxels pass in slabs, so that memory never contains a second volume."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.base.storage import ByteStream, GzipWriter, atomic_path, reading
from medad.ct.geometry import (
    GRID_TOLERANCE_VOXELS,
    SPACING_TOLERANCE,
    Geometry,
    advice,
    check_affine,
    grid_distance_voxels,
)
from medad.ct.voxels import SinkT

AffineFrom = Literal["agree", "sform", "qform"]
Spacing = tuple[float, float, float]

_SLAB_VOXELS = 1 << 22
_WRITE_SLAB_BYTES = 1 << 24
_HEADER_BYTES = {348: 1, 540: 2}  # sizeof_hdr -> NIfTI version
_MILLIMETRE_CODES = (0, 2)  # xyzt_units & 7: unknown, mm
_DEFLATE_LIMIT = 1032  # deflate cannot shrink data further than this
_INT_FIELDS = ("qform_code", "sform_code", "xyzt_units")
_FLOAT_FIELDS = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_LIST_FIELDS = ("pixdim", "srow_x", "srow_y", "srow_z")
_QUATERNION_EXCESS = 1e-3
"""Largest excess over 1 of a quaternion's squared length that counts as rounding."""
IDENTITY_NOTE = (
    "the affine is the identity: voxels of 1 x 1 x 1 mm were assumed, so volumes may be wrong; give their size by "
    f"{advice('spacing_mm', 'X Y Z')}"
)


def read_nifti(
    path: Path,
    sink: Callable[[int], SinkT],
    *,
    affine_from: AffineFrom = "agree",
    spacing_mm: Spacing | None = None,
    need_affine: bool = True,
) -> tuple[SinkT, Geometry, list[str]]:
    """Stream a NIfTI-1 or -2 file, gzipped or not, into `sink`. Return it with the grid and notes on the header.

    Parameters
    ----------
    sink
        Function that makes the receiver for a number of voxels. The receiver gets the voxels in the file's order.
    affine_from
        Affine to use if both are set. `"agree"` refuses a file with different sform and qform.
    spacing_mm
        Voxel size along the file's axes, for a file without affine or with the identity as affine. None: such a file is
        refused, or its voxels are taken as 1 mm with a note.
    need_affine
        Whether an affine is required. False: a file without affine gets the identity, for `affine_mismatch: warn`.

    Raises
    ------
    InputError
        The file is missing, cut short, damaged, or breaks one of the header's rules.
    """
    with reading(path), path.open("rb") as file:
        stream = ByteStream(file, path)
        header = _header(stream, path)
        shape = _shape(header, path)
        grid = _read_grid(header, shape, path, affine_from, spacing_mm, need_affine)
        geometry = Geometry(shape, grid.affine, _raw_geometry(header) if grid.is_whole else None)
        dtype = _dtype(header, path)
        slope, inter = _scaling(header, path)
        voxels = math.prod(shape)
        if voxels * dtype.itemsize > stream.stored_bytes * (_DEFLATE_LIMIT if stream.compressed else 1):
            raise InputError(path, f"the file is cut short: it is too small for the {voxels} voxels of its header")
        received = sink(voxels)
        slab = np.empty(min(voxels, _SLAB_VOXELS), dtype)
        for start in range(0, voxels, _SLAB_VOXELS):
            part = slab[: min(_SLAB_VOXELS, voxels - start)]
            if stream.readinto(part.view(np.uint8).data) < part.nbytes:
                raise InputError(path, f"the file is cut short: it has fewer than the {voxels} voxels of its header")
            native = part if dtype.isnative else part.astype(dtype.newbyteorder("="))
            received.put(start, _scaled(native, slope, inter))
        stream.drain()
    return received, geometry, grid.notes


def write_nifti(
    path: Path,
    array: NDArray[Any],
    geometry: Geometry,
    dtype: type[np.generic],
    *,
    verify: bool = False,
) -> None:
    """Write an array in source order as .nii.gz on its source's grid.

    The header is new: no description, no scaling, no extension, no free text of the source. Its geometry fields are
    copied bit for bit from a NIfTI source. For other formats sform and qform are set from the affine. Equal content
    gives equal bytes.

    Parameters
    ----------
    verify
        Whether to read the file back before it gets its name, and to compare header and voxels by digest.

    Raises
    ------
    DiskFullError
        The disk is full. No partial file remains.
    OSError
        Any other failure, for example different content when the file is read back (EIO).
    """
    header = _fresh_header(geometry, dtype)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            writer = GzipWriter(file)
            writer.write(header.binaryblock + b"\0\0\0\0")  # four zeros: no extension follows
            content = hashlib.sha256()
            for part in _slabs(array, np.dtype(dtype).itemsize):
                slab = part.ravel(order="F").astype(dtype, copy=False)
                writer.write(slab.data)
                if verify:
                    content.update(slab.data)
            writer.finish()
        if verify:
            _compare(temporary, path, header, content.digest())


def _slabs(array: NDArray[Any], itemsize: int) -> Iterator[NDArray[Any]]:
    step = max(1, _WRITE_SLAB_BYTES // (array.shape[0] * array.shape[1] * itemsize))
    for start in range(0, array.shape[2], step):
        yield array[:, :, start : start + step]


def _compare(written: Path, final: Path, expected: Any, content: bytes) -> None:
    found = hashlib.sha256()
    with written.open("rb") as file:
        try:
            stream = ByteStream(file, final)
            header = _header(stream, final)
            while block := stream.read(_WRITE_SLAB_BYTES):
                found.update(block)
        except InputError as error:
            raise OSError(errno.EIO, f"{final}: the written file cannot be read back ({error.rule})") from error
    if header.binaryblock != expected.binaryblock or found.digest() != content:
        raise OSError(errno.EIO, f"{final}: the written file has different content when it is read back")


def _fresh_header(geometry: Geometry, dtype: type[np.generic]) -> Any:
    raw = geometry.nifti
    header = nibabel.Nifti2Header() if raw is not None and raw["version"] == 2 else nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(geometry.shape)
    header["magic"] = b"n+2" if raw is not None and raw["version"] == 2 else b"n+1"
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    if raw is None:
        header.set_xyzt_units("mm")
        header.set_zooms(np.linalg.norm(geometry.affine[:3, :3], axis=0))
        header.set_qform(geometry.affine, code=1)
        header.set_sform(geometry.affine, code=1)
    else:
        for field in (*_INT_FIELDS, *_FLOAT_FIELDS, *_LIST_FIELDS):
            header[field] = raw[field]
    return header


def _header(stream: ByteStream, path: Path) -> Any:
    """Parse the header and leave the stream at the first voxel."""
    first = stream.read(4)
    if not first:
        raise InputError(path, "the file is empty")
    size = next((n for n in _HEADER_BYTES for order in ("little", "big") if int.from_bytes(first, order) == n), None)
    if size is None:
        raise InputError(path, "not a NIfTI file: its first bytes are not a NIfTI header's")
    block = first + stream.read(size - 4)
    if len(block) < size:
        raise InputError(path, "the file is cut short within its header")
    kind = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    header = kind(block, check=False)
    magic = bytes(header["magic"])[:3]
    if magic in (b"ni1", b"ni2"):
        raise InputError(path, "half of a .hdr/.img pair; convert it to one .nii.gz")
    if magic not in (b"n+1", b"n+2"):
        raise InputError(path, "not a NIfTI file: the header's magic bytes are wrong")
    offset = float(header["vox_offset"])
    if not size + 4 <= offset <= 1 << 30 or offset != int(offset):
        raise InputError(path, f"the header gives an impossible start of the voxels: byte {offset:g}")
    stream.read(int(offset) - size)
    return header


def _shape(header: Any, path: Path) -> tuple[int, int, int]:
    rank, *sizes = (int(n) for n in header["dim"])
    if not 1 <= rank <= 7 or any(n < 1 for n in sizes[:rank]):
        raise InputError(path, f"the header's sizes are invalid: dim = {[rank, *sizes]}")
    text = " x ".join(str(n) for n in sizes[:rank])
    if rank < 3:
        raise InputError(path, f"expected a volume of 3 dimensions, found {rank} ({text})")
    if any(n != 1 for n in sizes[3:rank]):
        raise InputError(path, f"expected a volume of 3 dimensions, found {rank} ({text}); split it first")
    return sizes[0], sizes[1], sizes[2]


def _dtype(header: Any, path: Path) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise InputError(path, f"unknown NIfTI datatype code {int(header['datatype'])}") from error
    if dtype.kind == "c" or dtype.fields is not None:
        what = "complex" if dtype.kind == "c" else "RGB"
        raise InputError(path, f"voxels are {what} values; expected one real number per voxel")
    if dtype.kind not in "iuf":
        raise InputError(path, f"voxels of type {dtype} are not supported")
    return dtype


def _scaling(header: Any, path: Path) -> tuple[float, float]:
    """Return slope and intercept. Slope 0 means no scaling in the standard, and nibabel writes NaN for no scaling."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise InputError(path, f"wrong rescale slope or intercept: scl_slope {slope:g}, scl_inter {inter:g}")
    return slope, inter


def _scaled(values: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    if (slope, inter) == (1.0, 0.0):
        return values
    result: NDArray[Any] = np.multiply(values, slope, dtype=np.float64)
    result += inter
    return result


def _raw_geometry(header: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {"version": _HEADER_BYTES[int(header["sizeof_hdr"])]}
    raw |= {field: int(header[field]) for field in _INT_FIELDS}
    raw |= {field: float(header[field]) for field in _FLOAT_FIELDS}
    raw |= {field: [float(value) for value in header[field]] for field in _LIST_FIELDS}
    return raw


def is_identity(affine: NDArray[np.float64]) -> bool:
    """Return whether an affine is the identity, apart from signs. Programs write it if they know no geometry."""
    return bool((np.abs(affine[:3, :3]) == np.eye(3)).all() and not affine[:3, 3].any())


@dataclass(frozen=True)
class _Grid:
    """The grid of a header. `is_whole`: every program reads it in the same way, so that outputs may copy it."""

    affine: NDArray[np.float64]
    notes: list[str]
    is_whole: bool


def _read_grid(
    header: Any,
    shape: tuple[int, int, int],
    path: Path,
    affine_from: AffineFrom,
    spacing_mm: Spacing | None,
    need_affine: bool,
) -> _Grid:
    if int(header["xyzt_units"]) & 7 not in _MILLIMETRE_CODES:
        raise InputError(path, "the header gives lengths in metres or micrometres; expected mm")
    notes: list[str] = []
    sizes = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    has_sizes = bool(np.isfinite(sizes).all() and (sizes > 0).all())
    sform, sform_problem = _sform(header)
    qform, qform_problem = _qform(header, sizes if has_sizes else None, notes)
    whole = not (sform_problem or qform_problem or notes) and has_sizes
    if sform is None and qform is None:
        if sform_problem or qform_problem:
            raise InputError(path, sform_problem or qform_problem)
        return _without_affine(path, spacing_mm, need_affine)
    notes += [f"{problem}; the {other} was used" for problem, other in _passed_over(sform_problem, qform_problem)]
    if not has_sizes and not qform_problem:
        notes.append(f"{_wrong_sizes(sizes)}; the voxel size of the sform was used")
    affine: NDArray[np.float64] = np.array(
        qform if sform is None or (affine_from == "qform" and qform is not None) else sform, dtype=np.float64
    )
    if spacing_mm is not None and is_identity(affine):
        affine[:3, :3] *= spacing_mm
        check_affine(affine, path)
        return _Grid(affine, [*notes, f"the given voxel size was used: {_sizes(spacing_mm)}"], whole)
    if affine_from == "agree" and sform is not None:
        _check_agreement(sform, qform, sizes if has_sizes else None, shape, path)
    check_affine(affine, path)
    stated = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing_mm is not None and np.abs(stated / spacing_mm - 1).max() > SPACING_TOLERANCE:
        notes.append(f"the header states a voxel size of {_sizes(stated)}, so the given one was not used")
    return _Grid(affine, notes, whole)


def _without_affine(path: Path, spacing_mm: Spacing | None, need_affine: bool) -> _Grid:
    affine = np.eye(4)
    if spacing_mm is not None:
        affine[:3, :3] *= spacing_mm
        check_affine(affine, path)
        how = "its axes were taken to run to the right, to anterior and to superior"
        note = f"the header has no affine: {how}, with {_sizes(spacing_mm)}; check left and right"
        return _Grid(affine, [note], False)
    if need_affine:
        rule = "no affine: qform_code and sform_code are both 0, so left and right are unknown"
        raise InputError(
            path, f"{rule}; if the axes run right, anterior and superior, type {advice('spacing_mm', 'X Y Z')}"
        )
    return _Grid(affine, [], False)


def _passed_over(sform_problem: str, qform_problem: str) -> list[tuple[str, str]]:
    found = [(sform_problem, "qform"), (qform_problem, "sform")]
    return [(problem, other) for problem, other in found if problem]


def _sform(header: Any) -> tuple[NDArray[np.float64] | None, str]:
    """Return the sform or None, and why it cannot be used. Shear and sizes are checked later."""
    sform = header.get_sform(coded=True)[0]
    if sform is not None and not sform[:3].any():
        return None, "sform_code is set, but all values of the sform are 0"
    if sform is not None and not np.isfinite(sform).all():
        return None, "the sform contains NaN or infinite values"
    return sform, ""


def _qform(header: Any, sizes: NDArray[np.float64] | None, notes: list[str]) -> tuple[NDArray[np.float64] | None, str]:
    """Return the qform or None, and why it cannot be used. A rounded quaternion is normalised with a note."""
    if int(header["qform_code"]) <= 0:
        return None, ""
    if sizes is None:
        return None, _wrong_sizes(header["pixdim"][1:4])
    if not all(math.isfinite(float(header[name])) for name in _FLOAT_FIELDS):
        return None, "the qform contains NaN or infinite values"
    quaternion = {name: float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d")}
    length = math.hypot(*quaternion.values())
    mended = header.copy()
    for name, value in quaternion.items():
        mended[name] = value / length if 1 < length**2 <= 1 + _QUATERNION_EXCESS else value
    for each in (header, mended):
        with contextlib.suppress(ValueError, HeaderDataError):
            qform = each.get_qform(coded=True)[0]
            if each is mended:
                notes.append("the qform's quaternion is longer than 1; it was normalised")
            return qform, ""
    return None, "the header's qform is not a rotation"


def _wrong_sizes(sizes: Any) -> str:
    return f"voxel size must be above 0 mm along every axis, found {' x '.join(f'{s:.4g}' for s in sizes)} in pixdim"


def _sizes(spacing: Any) -> str:
    return f"{' x '.join(f'{value:.4g}' for value in spacing)} mm"


def _check_agreement(sform: Any, qform: Any, spacing: NDArray[np.float64] | None, shape: Any, path: Path) -> None:
    check_affine(sform, path)
    if qform is not None:
        distance = grid_distance_voxels(sform, qform, shape)
        if not distance <= GRID_TOLERANCE_VOXELS:
            raise InputError(
                path,
                f"sform and qform differ by up to {distance:.3g} voxels; to use one, sform or qform, "
                f"type {advice('affine_from', 'sform')}",
            )
    scale = np.linalg.norm(sform[:3, :3], axis=0)
    if spacing is not None and np.abs(scale / spacing - 1).max() > SPACING_TOLERANCE:
        rule = f"voxel size is {_sizes(scale)} by sform but {_sizes(spacing)} by pixdim"
        raise InputError(path, f"{rule}; to use the sform, type {advice('affine_from', 'sform')}")
