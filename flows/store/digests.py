"""Content digests, remembered so that an unchanged file is read once instead of in every run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flows.machine.environment import cache_root
from medad.base.errors import InputError

MIN_UNCHANGED_S = 2.0
"""Smallest age of a file, in seconds, for which its digest is remembered. A younger file can change again and still
have the same size and time stamps."""
SCANS = (".nii", ".gz", ".mhd", ".mha", ".nrrd", ".nhdr", ".zip", ".dcm", ".ima", "")
"""Endings of scans and masks. Their voxels may be in another file than their header, or in a series of files."""


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _identity(path: Path, files: Sequence[Path]) -> tuple[str, int]:
    """Return a digest of names, sizes, time stamps and inodes, and the time of the newest change, ns.

    Several series of one folder depend on the same files, so the path counts too.
    """
    rows: list[object] = [] if list(files) == [path] else [os.path.abspath(path)]  # noqa: PTH100
    newest_ns = 0
    for file in files:
        stat = file.stat()
        rows.append((os.path.abspath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev))  # noqa: PTH100
        newest_ns = max(newest_ns, stat.st_mtime_ns, stat.st_ctime_ns)
    # digested, because a path on a hospital share may contain a patient's name
    return hashlib.sha256(repr(rows).encode()).hexdigest(), newest_ns


def _record(compute: Callable[[Path], str], identity: str) -> str:
    return f"{compute.__module__}.{compute.__qualname__}:{identity}"


class DigestMemory:
    """Digests by (path, size, mtime, ctime, inode), in an SQLite file shared by threads and processes.

    If the file is lost or cannot be used, the data are read again.
    """

    def __init__(self, database: Path) -> None:
        self.database = database

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.database.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.database, timeout=30)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS digest (identity TEXT PRIMARY KEY, sha256 TEXT NOT NULL)")
            yield connection

    def _recall(self, identity: str) -> str | None:
        try:
            with self._open() as connection:
                row = connection.execute("SELECT sha256 FROM digest WHERE identity = ?", (identity,)).fetchone()
        except sqlite3.OperationalError:  # busy
            return None
        except sqlite3.DatabaseError:
            with contextlib.suppress(OSError):
                self.database.unlink()  # it is damaged
            return None
        except OSError:  # another user's folder
            return None
        return None if row is None else str(row[0])

    def _remember(self, identity: str, sha256: str) -> None:
        with contextlib.suppress(sqlite3.Error, OSError), self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO digest VALUES (?, ?)", (identity, sha256))

    def get(
        self,
        path: Path,
        compute: Callable[[Path], str] = file_sha256,
        files: Sequence[Path] | None = None,
        *,
        watched: bool = False,
    ) -> str:
        """Return `compute(path)`, or its earlier result if the files are unchanged. Raises what `compute` raises.

        Parameters
        ----------
        files
            Files that `compute` reads. None: only `path`.
        watched
            Whether the caller has seen the files unchanged for longer than `MIN_UNCHANGED_S`, by a clock that never
            jumps. Then their time stamps, which another machine may have set, are not checked.
        """
        files = [path] if files is None else sorted(files)
        before, newest_ns = _identity(path, files)
        name = _record(compute, before)
        if (known := self._recall(name)) is not None:
            return known
        sha256 = compute(path)
        settled = watched or time.time_ns() - newest_ns > MIN_UNCHANGED_S * 1e9
        if settled and _identity(path, files)[0] == before:
            self._remember(name, sha256)
        return sha256

    def recall(self, path: Path, compute: Callable[[Path], str], files: Sequence[Path]) -> str | None:
        """Return the remembered digest of a path with unchanged files, or None if `get` would have to read them."""
        return self._recall(_record(compute, _identity(path, sorted(files))[0]))


def digest_memory() -> DigestMemory:
    """Return the memory of this process's cache."""
    return DigestMemory(cache_root() / "digests.sqlite")


def path_digest(path: Path) -> str:
    """Return the remembered sha256 of the content of a path: a file, a scan of several files, or a DICOM series.

    Raises
    ------
    InputError
        The path does not exist or cannot be read.
    """
    compute: Callable[[Path], str] = file_sha256
    try:
        files = [path]
        if path.suffix.lower() in SCANS or path.is_dir() or not path.exists():
            from medad.ct.io import source_digest as compute  # imported only if needed, since it is slow
            from medad.ct.io import source_files

            files = source_files(path)
        return digest_memory().get(path, compute, files)
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from error
