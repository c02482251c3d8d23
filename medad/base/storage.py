"""LEAF: files on disk. Atomic writes, JSON records, gzip streams read to their end, and digests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from medad.base.errors import DiskFullError, InputError, UserError

Model = TypeVar("Model", bound=BaseModel)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CHUNK_BYTES = 1 << 18
_GZIP_WBITS = 31  # gzip format: zlib itself writes and checks CRC and length


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. At the end of the block, the complete and synced file is renamed to `final`.

    The temporary file is in the same folder and has the same ending, because some writers choose the format by the
    ending. If the block ends early, the temporary file is removed and `final` does not change.

    Raises
    ------
    DiskFullError
        The disk is full or the quota is used up.
    """
    temporary = final.with_name(f".tmp-{secrets.token_hex(6)}-{final.name}")
    try:
        with disk_full_as_user_error(final):
            yield temporary
            sync_path(temporary)
            temporary.replace(final)
            sync_path(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full_as_user_error(final: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" errors of any library into DiskFullError.

    The caller removes the incomplete file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise DiskFullError(f"{final}: no room left on the disk; the incomplete output was removed") from error
        raise


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors raises its own error: "I/O error: No space left on device (os error 28)"
    return any(os.strerror(number) in str(error) for number in _FULL)


def write_bytes(final: Path, content: bytes) -> None:
    """Write a small file completely or not at all. Raises DiskFullError."""
    with atomic_path(final) as temporary:
        temporary.write_bytes(content)


def sync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's errors when reading `path` into InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(path, "no such file or folder") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror or 'input/output error'})") from error


class ByteStream:
    """Reader of a file's bytes. It recognises gzip by content, decompresses it and checks its checksums.

    Raises
    ------
    InputError
        The gzip stream is cut short or damaged. Every method may raise this.
    """

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self._file = file
        self._path = path
        self._pending = file.read(_CHUNK_BYTES)
        self.compressed = self._pending[:2] == b"\x1f\x8b"
        self._inflate = zlib.decompressobj(_GZIP_WBITS) if self.compressed else None
        self.stored_bytes = os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes. Only the end of the file gives fewer."""
        buffer = bytearray(count)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def readinto(self, target: memoryview) -> int:
        """Fill `target` and return the number of bytes written. Only the end of the file gives fewer."""
        filled = 0
        while filled < len(target):
            block = self._block(len(target) - filled)
            if not block:
                break
            target[filled : filled + len(block)] = block
            filled += len(block)
        return filled

    def drain(self) -> None:
        """Read and discard the rest, so that the checksum at the end is checked."""
        while self._block(1 << 24):
            pass

    def _block(self, limit: int) -> bytes:
        """Return between 1 and `limit` bytes, or no bytes at the end of the file."""
        while True:
            data = self._pending or self._file.read(_CHUNK_BYTES)
            self._pending = b""
            if self._inflate is None:
                self._pending = data[limit:]
                return data[:limit]
            if self._inflate.eof:
                data = data.lstrip(b"\0")  # tapes and some servers pad files with zeros
                if not data:
                    if self._file.peek(1):
                        continue
                    return b""
                self._inflate = zlib.decompressobj(_GZIP_WBITS)
            elif not data:
                raise InputError(self._path, "the gzip stream is cut short")
            try:
                block = self._inflate.decompress(data, limit)
            except zlib.error as error:
                reason = str(error).rsplit(": ", 1)[-1]
                raise InputError(self._path, f"the gzip stream is damaged ({reason})") from error
            self._pending = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            if block:
                return block


class GzipWriter:
    """Writer of gzip files that depend only on their content: no file name, no time. Level 1 is fast."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._deflate = zlib.compressobj(1, zlib.DEFLATED, _GZIP_WBITS)

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(self._deflate.compress(data))

    def finish(self) -> None:
        self._file.write(self._deflate.flush())
        self._file.flush()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, hexadecimal. Raises InputError."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines_digest(lines: Iterable[str]) -> str:
    """Return the sha256 of lines of text, hexadecimal. It combines the digests of several files into one."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises InputError."""
    with reading(path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise InputError(path, f"not valid JSON: {error}") from error


def read_record(model: type[Model], path: Path, kind: str = "") -> Model:
    """Read a JSON file as a record of type `model`.

    Raises
    ------
    InputError
        The file cannot be read, or is not `kind` (such as "an index of scores"). The message names the first wrong
        field.
    """
    head = f"not {kind}: " if kind else ""
    with reading(path):
        content = path.read_bytes()
    try:
        return model.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(path, f"{head}{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    except ValueError as error:
        raise InputError(path, f"{head}not valid JSON: {error}") from error
