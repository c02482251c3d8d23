"""The artifact store: results of steps, stored by the digest of their inputs and verified at each use.

    <cache>/<step>/<key>/        the step's files, and artifact.json, which describes them
    <cache>/tmp/<step>-<key>.X/  an artifact that is being made; moved to its final place when complete
    <cache>/runs/                one lock (flock) per running flow
    <cache>/locks/               one lock (flock) per key that is being made; the kernel frees it if its holder dies
    <cache>/digests.sqlite       remembered file digests

A key is a sha256 over the digests of the inputs, and over the settings, code and library versions of the step. It
contains no path and no case id, so a renamed scan has the same key.
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

from flows.machine.environment import cache_root, host_name
from flows.machine.locks import try_lock
from flows.machine.stopping import StoppedError, stopping
from flows.store.digests import DigestMemory, file_sha256
from flows.store.references import Ref, canonical_json, library_versions
from flows.store.step import Step, content_key
from medad.base.storage import disk_full_as_user_error, sync_path

SIDECAR = "artifact.json"
POLL_S = 0.05
NOTICE_S = 5.0
"""Waiting time for a lock after which a line says who holds it."""


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str
    volatile: bool = False


class Sidecar(BaseModel):
    """The content of artifact.json: what the artifact is, its inputs, and the digests of its files."""

    model_config = ConfigDict(frozen=True)

    step: str
    version: int
    key: str
    parts: dict[str, Any]
    """Parts of the key, by name."""
    files: dict[str, FileEntry]
    digest: str
    libraries: dict[str, str]
    created: str
    """Creation time, UTC, ISO 8601."""
    seconds: float
    device: str = ""
    """Device that computed it: `cpu` or `gpu-N`. Empty for a step that needs no device."""
    notes: tuple[str, ...] = ()
    """Notes about deviations from the request while it was made."""


@dataclass(frozen=True)
class BuildRecord:
    """A record of the making of an artifact."""

    began: float
    """Start time by `time.monotonic`, after any wait for a device."""
    device: str = ""
    notes: tuple[str, ...] = ()
    """Notes about deviations from the request, such as smaller batches because memory was short."""

    @classmethod
    def now(cls, device: str) -> BuildRecord:
        """Return a record that starts now, on a device."""
        return cls(time.monotonic(), device)


@dataclass(frozen=True)
class RunMark:
    """The locked file that says that a run is running."""

    path: Path
    descriptor: int

    def end(self) -> None:
        """Remove the file and its lock."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


class DamagedArtifactError(Exception):
    """An artifact is missing, incomplete or changed."""


def files_digest(files: Mapping[str, FileEntry]) -> str:
    """Return the sha256 over names and digests of an artifact's files, without the volatile ones."""
    rows = [(name, entry.sha256) for name, entry in sorted(files.items()) if not entry.volatile]
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


def _mark_used(folder: Path) -> None:
    """Set the folder's time stamp, which pruning uses as the time of last use. Does nothing in a read-only cache."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def _try_lock(path: Path) -> int | None:
    """Lock a file and write this process into it. Return its descriptor. None: another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not try_lock(descriptor):
                os.close(descriptor)
                return None
            # the last holder removes the file, so check that the locked file is still the one on disk
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.pwrite(descriptor, f"process {os.getpid()} on {host_name()}".encode(), 0)
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


class ArtifactStore:
    """The artifacts in one cache folder. Safe for threads, processes and kill -9."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_root()
        self.digests = DigestMemory(self.root / "digests.sqlite")

    def folder(self, step: str, key: str) -> Path:
        return self.root / step / key

    @contextlib.contextmanager
    def lock(
        self, name: str, *, wait: bool = True, on_wait: Callable[[str], None] = lambda line: None
    ) -> Iterator[bool]:
        """Hold `<cache>/locks/<name>.lock`. Yields False, without the lock, if it is taken and `wait` is False.

        `on_wait` shows one line about who holds the lock. Raise StoppedError if the flow is stopped while it waits.
        """
        path = self.root / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        notice = time.monotonic() + NOTICE_S
        while (descriptor := _try_lock(path)) is None:
            if not wait:
                yield False
                return
            if stopping.is_set():
                raise StoppedError
            if time.monotonic() > notice:
                on_wait(f"waiting for {_holder_text(path)}, which makes the same result")
                notice = math.inf
            time.sleep(POLL_S)
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def mark_run(self) -> RunMark:
        """Mark a run as running until the mark ends or the process dies. See `oldest_run_start`."""
        folder = self.root / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return RunMark(path, descriptor)

    def oldest_run_start(self) -> float:
        """Return the start time of the oldest running flow, seconds since 1970. Infinity if none is running.

        If a running flow has used an artifact, the artifact's time of last use is after this time.
        """
        began = [math.inf]
        for path in (self.root / "runs").glob("*.lock"):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)  # left by a killed run
                except BlockingIOError:
                    began.append(path.stat().st_mtime)
                finally:
                    os.close(descriptor)
        return min(began)

    def sidecar(self, ref: Ref) -> Sidecar:
        """Read an artifact's sidecar without checking its files."""
        return Sidecar.model_validate_json((self.root / ref.path / SIDECAR).read_bytes())

    def verify(self, ref: Ref) -> Sidecar:
        """Read an artifact's sidecar and check every file against it. Raises DamagedArtifactError."""
        sidecar = self._read(self.root / ref.path)
        if (sidecar.step, sidecar.key, sidecar.digest) != (ref.step, ref.key, ref.digest):
            raise DamagedArtifactError(f"{ref.step} {ref.key}: replaced by another result")
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
        """Return the artifact with this key, or None if it is missing or damaged."""
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
        self,
        step: Step,
        parts: Mapping[str, Any],
        body: Callable[[Path], BuildRecord | None],
        *,
        refresh: bool = False,
        on_wait: Callable[[str], None] = lambda line: None,
    ) -> tuple[Ref, bool]:
        """Return the artifact of `step` for the key of `parts`, running `body` on an empty folder if it must be made.

        One process makes the artifact, and others that need it wait. `on_wait` shows one line about what they wait for.
        If `body` fails, its files are removed. The second returned value is whether the artifact existed already.

        Raises
        ------
        DiskFullError
            The disk is full. The incomplete files are removed.
        """
        key = content_key(parts)
        name = f"{step.name}-{key}"
        with disk_full_as_user_error(self.root), self.lock(name, on_wait=on_wait):
            if not refresh and (found := self.find(step, key)) is not None:
                return found, True
            for leftover in (self.root / "tmp").glob(f"{name}.*"):  # left by a killed process, since the lock is ours
                shutil.rmtree(leftover, ignore_errors=True)
            # a new name, since a process of a killed run may still write into the old folder for a moment
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
        if final.exists():  # damaged or refreshed; a folder cannot replace a non-empty folder in one call
            final.replace(old)
        work.replace(final)
        sync_path(final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def sweep(self) -> int:
        """Remove unlocked folders in tmp/, which killed processes left. Returns the number removed."""
        removed = 0
        folder = self.root / "tmp"
        for leftover in sorted(folder.iterdir()) if folder.is_dir() else []:
            with self.lock(leftover.name.partition(".")[0], wait=False) as held:
                if held:
                    shutil.rmtree(leftover, ignore_errors=True)
                    removed += 1
        return removed
