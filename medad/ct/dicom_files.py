"""The DICOM files of an export: in a folder and its sub-folders, in a zip, or one file. Only headers are read.

Files are opened here and never by name in a library, because a name on a disk need not be valid text. Values of tags
are read as bytes, so that a wrong character set or number cannot raise an error or a warning that quotes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from medad.base.errors import InputError
from medad.base.storage import reading

MAX_FILES = 20_000
"""Largest number of files of one export. A CT has at most a few thousand slices."""
MAX_DEPTH = 12
MAX_MEMBER_BYTES = 1 << 30
"""Largest file in a zip after decompression. A multi-frame CT of 1000 slices has 0.5 GB."""
MAX_ZIP_BYTES = 16 << 30
MAX_ZIP_RATIO = 200
"""Largest ratio of decompressed to stored size of a zip. CT in DICOM compresses by 2 to 20."""

_OTHER_NAMES = frozenset({"DICOMDIR", "VERSION", "LICENSE", "LOCKFILE", "README", "THUMBS.DB", "AUTORUN.INF"})
_DICOM_ENDINGS = frozenset({".dcm", ".ima", ".dicom", ".dic"})
_NIFTI_ENDINGS = (".nii", ".nii.gz")
_TRANSFER_SYNTAX = 0x00020010
_MAGIC_AT = 128
_HEAD_BYTES = 132

# pydicom's warnings and logs quote values
warnings.filterwarnings("ignore", module=r"pydicom\.")
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").disabled = True


@dataclass(frozen=True, order=True)
class DicomFile:
    """A file, or a member of a zip."""

    path: Path
    member: str = ""

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file. Raises InputError."""
        with reading(self.path):
            if not self.member:
                with self.path.open("rb") as file:
                    yield file
                return
            with zipfile.ZipFile(self.path) as archive, _zip_errors(self.path):
                # pydicom seeks, and a member can only be read forwards
                yield io.BytesIO(archive.read(self.member))

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2] if self.member else self.path.name

    def digest(self) -> str:
        """Return the sha256 of the bytes, hex."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextlib.contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise InputError(path, "the zip is damaged or cut short") from error
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(path, "the zip is encrypted, or compressed by an unknown method; unpack it first") from error


@dataclass(frozen=True)
class Export:
    """The files of an export that may be DICOM, and the number of the others by kind."""

    files: tuple[DicomFile, ...]
    other: Counter[str] = field(default_factory=Counter)


def is_zip(path: Path) -> bool:
    """Return whether a file has the ending of a zip."""
    return path.suffix.lower() == ".zip" and path.is_file()


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM files do. Raises InputError."""
    with reading(path), path.open("rb") as file:
        return _looks_like_dicom(file.read(_HEAD_BYTES))


def _looks_like_dicom(head: bytes) -> bool:
    if head[_MAGIC_AT:] == b"DICM":
        return True
    # without preamble: the first element is of group 2 or 8, in either byte order
    group, element = struct.unpack("<HH", head[:4]) if len(head) >= 8 else (0, 0)
    return (group in (0x0002, 0x0008) and element < 0x0100) or (
        head[:2] in (b"\0\x02", b"\0\x08") and head[2:3] == b"\0"
    )


def is_index(path: Path) -> bool:
    """Return whether a file is the index of an export, which stands for its folder."""
    return path.name.upper() == "DICOMDIR" and path.is_file()


def list_siblings(path: Path) -> list[Path]:
    """Return the visible files of the folder of a file, sorted."""
    with reading(path):
        return sorted(file for file in path.parent.iterdir() if file.is_file() and not file.name.startswith("."))


def list_files(path: Path) -> list[Path]:
    """Return all files that belong to an export, sorted: those of a folder and its sub-folders, or one file.

    Nothing is opened. Hidden files and folders are left out, and linked folders are not followed.

    Raises
    ------
    InputError
        The folder has no files or too many, or a link leads nowhere.
    """
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    broken = 0
    with reading(path):
        for folder, folders, names in os.walk(path, onerror=_raise):
            depth = len(Path(folder).relative_to(path).parts)
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < MAX_DEPTH else []
            for name in names:
                file = Path(folder) / name
                if name.startswith("."):
                    continue
                try:
                    mode = file.stat().st_mode
                except FileNotFoundError:
                    broken += file.is_symlink()
                    continue
                if stat.S_ISREG(mode):
                    found.append(file)
                if len(found) > MAX_FILES:
                    raise InputError(path, f"more than {MAX_FILES} files; give the folder of one examination")
    if broken:
        # files that are missing at the end of a series would shorten the volume
        links = f"{broken} link{'s lead' if broken > 1 else ' leads'}"
        raise InputError(path, f"{links} nowhere: files of this folder are missing")
    if not found:
        raise InputError(path, "no DICOM file in this folder or its sub-folders")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def list_export(path: Path) -> Export:
    """Return the files of a folder, a zip or a DICOMDIR that may be DICOM.

    Raises
    ------
    InputError
        The file does not exist, or it holds too much. A zip is damaged, unsafe or a bomb.
    """
    if is_index(path):
        path = path.parent
    files = _zip_members(path) if is_zip(path) else [DicomFile(file) for file in list_files(path)]
    other: Counter[str] = Counter()
    kept = []
    for file in files:
        if (kind := _other_kind(file.name)) is not None:
            other[kind] += 1
        else:
            kept.append(file)
    if not kept and other["NIfTI"]:
        raise InputError(path, "holds NIfTI files and no DICOM; give the file of the scan")
    if not kept:
        raise InputError(path, "no DICOM file in this folder or its sub-folders")
    return Export(tuple(kept), other)


def _other_kind(name: str) -> str | None:
    """Return the kind of a file whose name shows that it is not DICOM. None: its content decides."""
    lower = name.lower()
    if lower.endswith(_NIFTI_ENDINGS):
        return "NIfTI"
    if name.upper() in _OTHER_NAMES:
        return "index or note"
    ending = re.search(r"\.[a-z][a-z0-9]{0,4}$", lower)
    if ending is None or ending.group() in _DICOM_ENDINGS:
        return None
    return ending.group() if ending.group() in _KNOWN_ENDINGS else None


_KNOWN_ENDINGS = frozenset(
    f".{ending}"
    for endings in (
        "txt xml json md csv pdf ini db html htm jpg jpeg png gif bmp tif tiff doc docx xls xlsx exe dll bat inf log",
        "zip rar 7z tar gz mha mhd raw nrrd nhdr seg npy npz mat avi mp4 css js ico jar sh py yaml yml sqlite lnk url",
    )
    for ending in endings.split()
)
"""Endings of files that are never slices. Other endings, such as `.0001`, may belong to DICOM."""


def _zip_members(path: Path) -> list[DicomFile]:
    with reading(path), _zip_errors(path), zipfile.ZipFile(path) as archive:
        members = [each for each in archive.infolist() if not each.is_dir()]
    if len(members) > MAX_FILES:
        raise InputError(path, f"the zip has more than {MAX_FILES} files")
    total = 0
    for each in members:
        parts = re.split(r"[/\\]", each.filename)
        if each.filename.startswith(("/", "\\")) or ".." in parts or re.match("[A-Za-z]:", each.filename):
            raise InputError(path, "the zip is unsafe: the name of a file leads out of it")
        if stat.S_ISLNK(each.external_attr >> 16):
            raise InputError(path, "the zip is unsafe: it has links")
        if each.flag_bits & 1:
            raise InputError(path, "the zip is encrypted; unpack it first")
        total += each.file_size
        if (
            each.file_size > MAX_MEMBER_BYTES
            or total > MAX_ZIP_BYTES
            or each.file_size > MAX_ZIP_RATIO * max(each.compress_size, 1 << 16)
        ):
            raise InputError(path, "the zip is a bomb: its content is far larger than CT can be")
    names = [each.filename for each in members if not any(part.startswith(".") for part in each.filename.split("/"))]
    return [DicomFile(path, name) for name in sorted(set(names))]


class Header:
    """The header of a DICOM file, with values as plain text and numbers."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def raw(self, tag: int) -> bytes:
        """Return the bytes of an element, or none if it is missing."""
        value = getattr(self._item(tag), "value", None)
        if value is None:
            return b""
        return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")

    def text(self, tag: int) -> str:
        return self.raw(tag).decode("latin-1").strip("\0 ")

    def numbers(self, tag: int) -> list[float]:
        """Return the numbers of a decimal string. It is empty if they are missing or invalid."""
        try:
            return [float(part) for part in self.text(tag).replace("[", "").replace("]", "").split("\\")]
        except ValueError:
            return []

    def integer(self, tag: int) -> int | None:
        """Return an unsigned binary number, such as Rows. None: it is missing or invalid."""
        item = self._item(tag)
        value = getattr(item, "value", None)
        if isinstance(value, int):
            return value
        if not isinstance(value, bytes) or len(value) < 2:
            return None
        little = getattr(item, "is_little_endian", True)
        return int(struct.unpack("<H" if little else ">H", value[:2])[0])

    def _item(self, tag: int) -> Any:
        """Return an element. None: it is missing, or its type is not one of DICOM's."""
        try:
            return self.data.get_item(tag) if tag in self.data else None
        except NotImplementedError:
            return None

    def sequence(self, tag: int) -> list[Header]:
        """Return the items of a sequence."""
        try:
            found: Any = self.data[tag].value if tag in self.data else []
            return [Header(item) for item in found]
        except Exception:
            return []

    def meta(self, tag: int) -> str:
        """Return a text of the file's meta information."""
        found = getattr(self.data, "file_meta", None)
        return "" if found is None else Header(found).text(tag)

    @property
    def transfer_syntax(self) -> str:
        if stated := self.meta(_TRANSFER_SYNTAX):
            return stated
        implicit, little = self.data.original_encoding
        if implicit:
            return "1.2.840.10008.1.2"
        return "1.2.840.10008.1.2.1" if little is not False else "1.2.840.10008.1.2.2"


def read_header(file: DicomFile, tags: Iterable[int] | None) -> Header | None:
    """Read these tags of a file, or all but the pixels. None: the file is not DICOM.

    Raises
    ------
    InputError
        The file is DICOM but damaged, or cannot be read.
    """
    return _read(file, None if tags is None else list(tags), pixels=False)


def read_whole(file: DicomFile) -> Header:
    """Read a file with its pixels. Raises InputError."""
    found = _read(file, None, pixels=True)
    if found is None:
        raise InputError(file.path, "not a readable DICOM image")
    return found


def _read(file: DicomFile, tags: list[int] | None, *, pixels: bool) -> Header | None:
    with file.open() as stream:
        head = stream.read(_HEAD_BYTES)
        if not _looks_like_dicom(head):
            return None
        stream.seek(0)
        wanted = None if tags is None else [Tag(tag) for tag in tags]
        try:
            data = pydicom.dcmread(stream, stop_before_pixels=not pixels, force=True, specific_tags=wanted)
        except OSError:
            raise  # the share does not answer
        except Exception:
            rule = "not a readable DICOM file: its header is damaged"
            raise InputError(file.path, rule) from None  # the original error quotes the file
    return Header(data)
