"""Reading of MetaImage (.mhd, .mha) and NRRD (.nrrd, .nhdr) with SimpleITK, and checks that SimpleITK does not make."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from medad.base.errors import InputError
from medad.base.storage import reading
from medad.ct.geometry import Geometry, check_affine
from medad.ct.voxels import SinkT

METAIMAGE = (".mhd", ".mha")
NRRD = (".nrrd", ".nhdr")
_SLAB_VOXELS = 1 << 22
_HEADER_LIMIT_BYTES = 1 << 20
_COMPONENTS_BY_NAME = ("vector", "complex", "label")


def silence_itk_warnings() -> None:
    """Turn off the warnings of ITK and GDCM on stderr. They quote tags and paths, and stderr may be a worker's log.

    The switch stays off: threads that turned it off and on would disturb each other.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def read_itk(path: Path, sink: Callable[[int], SinkT]) -> tuple[SinkT, Geometry]:
    """Read one MetaImage or NRRD file into `sink`. Raises InputError."""
    check_files(path)
    silence_itk_warnings()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() in NRRD else "MetaImageIO")  # also for upper-case endings
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = _shape(reader.GetSize(), path)
        if reader.GetNumberOfComponents() != 1 or any(
            word in sitk.GetPixelIDValueAsString(reader.GetPixelID()) for word in _COMPONENTS_BY_NAME
        ):
            raise InputError(path, "voxels have several values (colour, vector or complex); expected one real number")
        affine = affine_from_itk(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin())
        check_affine(affine, path)
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(path, "not readable as MetaImage or NRRD: it is cut short or its header is wrong") from error
    flat = sitk.GetArrayViewFromImage(image).reshape(-1)
    received = sink(flat.size)
    for start in range(0, flat.size, _SLAB_VOXELS):
        received.put(start, flat[start : start + _SLAB_VOXELS])
    return received, Geometry(shape, affine)


def affine_from_itk(
    direction: tuple[float, ...], spacing: tuple[float, ...], origin: tuple[float, ...]
) -> NDArray[np.float64]:
    """Convert ITK's direction (row-major), spacing and origin in LPS mm to a 4 x 4 affine to RAS mm.

    Only the first three axes count.
    """
    rank = len(spacing)
    affine = np.eye(4)
    affine[:3, :3] = np.array(direction).reshape(rank, rank)[:3, :3] * np.array(spacing[:3])
    affine[:3, 3] = origin[:3]
    affine[:2] *= -1
    return affine + 0.0  # no -0.0


def data_files(path: Path) -> list[Path]:
    """Return the header file and, if the voxels are in another file, that file too. Raises InputError."""
    name = _detached_data_file(header_text(path), path)
    return [path] if name is None else [path, path.parent / name]


def header_text(path: Path) -> str:
    """Return the header of a MetaImage or NRRD file. Raises InputError."""
    with reading(path), path.open("rb") as file:
        head = file.read(_HEADER_LIMIT_BYTES)
    if not head:
        raise InputError(path, "the file is empty")
    return head[: _header_end(head, path)].decode("latin-1")


def _header_end(head: bytes, path: Path) -> int:
    pattern = rb"\r?\n\r?\n" if path.suffix.lower() in NRRD else rb"(?m)^ElementDataFile\s*=[^\n]*(\n|\Z)"
    found = re.search(pattern, head)
    return found.end() if found else len(head)


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"(?mi)^{name}\s*[:=]=?\s*(.*?)\s*$", text)
    return found.group(1) if found else None


def _detached_data_file(text: str, path: Path) -> str | None:
    nrrd = path.suffix.lower() in NRRD
    name = _field(text, "data ?file" if nrrd else "ElementDataFile")
    if name is None and not nrrd:
        raise InputError(path, "the header names no ElementDataFile")
    if name is None or name.upper() == "LOCAL":
        return None
    if name.upper().startswith("LIST") or "%" in name or "\0" in name or Path(name).name != name:
        raise InputError(path, "the voxels must be in one file in the header's folder")
    return name


def check_files(path: Path) -> None:
    """Check what SimpleITK does not: the data file exists, the header has a geometry, compressed data is undamaged."""
    text = header_text(path)
    nrrd = path.suffix.lower() in NRRD
    if nrrd and not text.startswith("NRRD"):
        raise InputError(path, "not an NRRD file: its first bytes are not an NRRD header's")
    if _field(text, "space directions" if nrrd else "ElementSpacing") is None:
        raise InputError(path, f"no affine: the header has no {'space directions' if nrrd else 'ElementSpacing'}")
    if not nrrd:
        _check_spacing((_field(text, "ElementSpacing") or "").split(), path)
    name = _detached_data_file(text, path)
    data = path if name is None else path.parent / name
    if not data.is_file():
        raise InputError(path, "the voxel file named in the header is missing")
    if nrrd:
        compressed = (_field(text, "encoding") or "").lower() in ("gzip", "gz")
    else:
        compressed = (_field(text, "CompressedData") or "").lower() == "true"
    if compressed:
        _check_stream(data, len(text) if name is None else 0, path)


def _check_spacing(words: list[str], path: Path) -> None:
    try:
        spacing = [float(word) for word in words]
    except ValueError:
        raise InputError(path, "voxel size is not numbers (ElementSpacing)") from None
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        raise InputError(path, f"voxel size must be above 0 mm along every axis, found {spacing}")


def _check_stream(data: Path, offset: int, path: Path) -> None:
    """Decompress to the end to check the checksum. MetaImage ignores it and would read a flipped bit as voxels."""
    inflate = zlib.decompressobj(47)  # zlib or gzip format, detected automatically
    with reading(data), data.open("rb") as file:
        file.seek(offset)
        pending = b""
        try:
            while not inflate.eof:
                pending = pending or file.read(1 << 18)
                if not pending:
                    raise InputError(path, "the compressed voxels are cut short")
                inflate.decompress(pending, 1 << 24)
                pending = inflate.unconsumed_tail
        except zlib.error as error:
            raise InputError(path, f"the compressed voxels are damaged ({str(error).rsplit(': ', 1)[-1]})") from error


def _shape(size: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    if len(size) < 3 or any(n != 1 for n in size[3:]):
        text = " x ".join(str(n) for n in size)
        raise InputError(path, f"expected a volume of 3 dimensions, found {len(size)} ({text}); split it first")
    return size[0], size[1], size[2]
