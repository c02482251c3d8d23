"""Artifacts by content: what a step made from given bytes, settings and code, kept once and checked at every use.

    <cache>/<step>/<key>/        the step's files and artifact.json, which says what they are
    <cache>/tmp/<step>-<key>.X/  being made; moved into place whole
    <cache>/runs/                one flock a run under way
    <cache>/locks/               one flock a key while it is being made: the kernel frees it when its holder dies
    <cache>/digests.sqlite       remembered file digests

A key is a sha256 over the digests of the inputs, the settings the step depends on, the code it can reach and the
versions of the libraries it uses. No path and no case id is in it: a renamed scan is the same scan.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.machine.environment import cache_root
from flows.store.digests import DigestMemory, file_sha256
from flows.store.references import Ref, canonical_json, library_versions
from flows.store.step import Step, content_key
from medad.base.storage import disk_full_as_user_error, sync_path

SIDECAR = "artifact.json"


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str
    volatile: bool = False


class Sidecar(BaseModel):
    """artifact.json: what an artifact is, from what it was made, and how to tell that it is whole."""

    model_config = ConfigDict(frozen=True)

    step: str
    version: int
    key: str
    parts: dict[str, Any]
    """What went into the key, by name."""
    files: dict[str, FileEntry]
    digest: str
    libraries: dict[str, str]
    created: str
    """UTC, ISO 8601."""
    seconds: float
    device: str = ""
    """Where it was computed: `cpu` or `gpu-N`; empty of a step that needs no device."""
    notes: tuple[str, ...] = ()
    """What went otherwise than asked for while it was made."""


@dataclass(frozen=True)
class BuildRecord:
    """How an artifact came to be, where that is worth telling."""

    began: float
    """By `time.monotonic`: after any wait for a device."""
    device: str = ""
    notes: tuple[str, ...] = ()
    """What went otherwise than asked for, such as smaller batches for want of memory."""

    @classmethod
    def now(cls, device: str) -> BuildRecord:
        """Return the record of a call that begins on a device."""
        return cls(time.monotonic(), device)


class DamagedArtifactError(Exception):
    """An artifact is gone, incomplete or changed."""


def files_digest(files: Mapping[str, FileEntry]) -> str:
    """sha256 over names and digests of an artifact's files, without the volatile ones."""
    rows = [(name, entry.sha256) for name, entry in sorted(files.items()) if not entry.volatile]
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


def _mark_used(folder: Path) -> None:
    """The folder's time stamp says when it last served: pruning asks for it. A cache that is only read has none."""
    with contextlib.suppress(OSError):
        os.utime(folder)


class ArtifactStore:
    """The artifacts below one cache folder. Safe for threads, processes and kill -9."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_root()
        self.digests = DigestMemory(self.root / "digests.sqlite")

    def folder(self, step: str, key: str) -> Path:
        return self.root / step / key

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold `<cache>/locks/<name>.lock`; yields False, holding nothing, when it is taken and `wait` is False."""
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # the last holder removes the file: make sure that the one locked is the one still there
                current = os.stat(path).st_ino == os.fstat(descriptor).st_ino  # noqa: PTH116
            except BlockingIOError:
                os.close(descriptor)
                yield False
                return
            except FileNotFoundError:
                current = False
            except BaseException:
                os.close(descriptor)
                raise
            if current:
                break
            os.close(descriptor)
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def mark_run(self) -> Callable[[], None]:
        """Say that a run is under way; returns what ends it, as does the process's death. See `oldest_run_start`."""
        folder = self.root / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)

        def end() -> None:
            path.unlink(missing_ok=True)
            os.close(descriptor)

        return end

    def oldest_run_start(self) -> float:
        """When the oldest run under way began, seconds since 1970; infinity where there is none.

        Whatever such a run has used so far was used after that.
        """
        began = [math.inf]
        for path in (self.root / "runs").glob("*.lock"):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)  # of a run that was killed
                except BlockingIOError:
                    began.append(path.stat().st_mtime)
                finally:
                    os.close(descriptor)
        return min(began)

    def sidecar(self, ref: Ref) -> Sidecar:
        """What is written about an artifact, without a look at its files."""
        return Sidecar.model_validate_json((self.root / ref.path / SIDECAR).read_bytes())

    def verify(self, ref: Ref) -> Sidecar:
        """Read an artifact's sidecar and check every file against it. Raises DamagedArtifactError."""
        sidecar = self._read(self.root / ref.path)
        if (sidecar.step, sidecar.key, sidecar.digest) != (ref.step, ref.key, ref.digest):
            raise DamagedArtifactError(f"{ref.step} {ref.key}: made anew since")
        _mark_used(self.root / ref.path)
        return sidecar

    def _read(self, folder: Path) -> Sidecar:
        try:
            sidecar = Sidecar.model_validate_json((folder / SIDECAR).read_bytes())
            if sidecar.digest != files_digest(sidecar.files):
                raise DamagedArtifactError(f"{sidecar.step} {sidecar.key}: {SIDECAR} is damaged")
            for name, entry in sidecar.files.items():
                file = folder / name
                if file.stat().st_size != entry.size or self.digests.get(file) != entry.sha256:
                    raise DamagedArtifactError(f"{sidecar.step} {sidecar.key}: {name} is damaged")
        except (OSError, ValidationError) as error:
            raise DamagedArtifactError(f"{folder.parent.name} {folder.name}: incomplete") from error
        return sidecar

    def find(self, step: Step, key: str) -> Ref | None:
        """The artifact of this key, if it is there and whole."""
        folder = self.folder(step.name, key)
        try:
            sidecar = self._read(folder)
        except DamagedArtifactError:
            return None
        if (sidecar.step, sidecar.key) != (step.name, key):
            return None
        _mark_used(folder)
        return Ref(step=step.name, key=key, digest=sidecar.digest, path=str(folder.relative_to(self.root)))

    def build(
        self, step: Step, parts: Mapping[str, Any], body: Callable[[Path], BuildRecord | None], *, refresh: bool = False
    ) -> tuple[Ref, bool]:
        """Return the artifact of `step` for the key of `parts`, running `body` on an empty folder if it must be made.

        One process makes it while others that want it wait. A body that fails leaves nothing behind. The second value
        tells whether the artifact was there.

        Raises
        ------
        DiskFullError
            No room; what was half-written has been removed.
        """
        key = content_key(parts)
        name = f"{step.name}-{key}"
        with disk_full_as_user_error(self.root), self.lock(name):
            if not refresh and (found := self.find(step, key)) is not None:
                return found, True
            for leftover in (self.root / "tmp").glob(f"{name}.*"):  # of a killed predecessor: the lock is ours
                shutil.rmtree(leftover, ignore_errors=True)
            # a new name: a killed run's process may be writing into the old one for another moment
            work = self.root / "tmp" / f"{name}.{uuid.uuid4().hex[:8]}"
            work.mkdir(parents=True)
            try:
                called = time.monotonic()
                record = body(work) or BuildRecord(called)
                sidecar = self._seal(step, key, parts, work, record)
                self._move_into_place(work, self.folder(step.name, key))
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return Ref(step=step.name, key=key, digest=sidecar.digest, path=f"{step.name}/{key}"), False

    @staticmethod
    def _seal(step: Step, key: str, parts: Mapping[str, Any], work: Path, record: BuildRecord) -> Sidecar:
        seconds = time.monotonic() - record.began
        files = {}
        for file in sorted(path for path in work.rglob("*") if path.is_file()):
            sync_path(file)
            name = file.relative_to(work).as_posix()
            files[name] = FileEntry(size=file.stat().st_size, sha256=file_sha256(file), volatile=name in step.volatile)
        sidecar = Sidecar(
            step=step.name,
            version=step.version,
            key=key,
            parts=dict(parts),
            files=files,
            digest=files_digest(files),
            libraries=library_versions(step.libraries),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            device=record.device,
            notes=record.notes,
        )
        (work / SIDECAR).write_text(sidecar.model_dump_json(indent=1) + "\n", encoding="utf-8")
        sync_path(work / SIDECAR)
        sync_path(work)
        return sidecar

    def _move_into_place(self, work: Path, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        old = work.with_name(f"{work.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():  # damaged, or refreshed: a folder cannot replace a full folder in one call
            final.replace(old)
        work.replace(final)
        sync_path(final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def sweep(self) -> int:
        """Remove what killed processes left in tmp/ and whose lock nobody holds; returns how many."""
        removed = 0
        folder = self.root / "tmp"
        for leftover in sorted(folder.iterdir()) if folder.is_dir() else []:
            with self.lock(leftover.name.partition(".")[0], wait=False) as held:
                if held:
                    shutil.rmtree(leftover, ignore_errors=True)
                    removed += 1
        return removed
