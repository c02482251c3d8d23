"""The run folder: the results of a run for people, copied out of the cache.

runs/<flow>/<name>/report.html, report.json, preview.png and further files of the flow
                   manifest.json           inputs, settings, versions, times and a list of the files
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.runs.headline import Figure, read_headline
from flows.runs.runner import Runner
from flows.runs.runs_page import root_of, write_runs_page
from flows.store.artifacts import ArtifactStore
from flows.store.digests import file_sha256
from flows.store.references import Ref
from medad.base.errors import ConfigError
from medad.base.manifest import MANIFEST, MANIFEST_SCHEMA
from medad.base.settings import Settings
from medad.base.storage import disk_full_as_user_error, sync_path

REPORTED_LIBRARIES = (
    "adflows",
    "prefect",
    "torch",
    "torchvision",
    "open_clip_torch",
    "monai",
    "lightgbm",
    "numpy",
    "scipy",
    "scikit-image",
    "pillow",
    "nibabel",
    "SimpleITK",
    "safetensors",
)


@dataclass(frozen=True)
class FileCopy:
    """A file of an artifact to copy into the run folder."""

    ref: Ref
    source: str
    """Name in the artifact. A folder means all files in it. A name that does not exist is left out."""
    target: str
    """Name in the run folder."""


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run folder, before it is written."""

    path: Path
    settings: Settings
    copies: tuple[FileCopy, ...]
    manifest: Callable[[], Mapping[str, Any]]
    """Function that returns the flow's entries of the manifest, such as digests. JSON values without paths."""
    seconds: float
    write_more: Callable[[Path], None] = lambda folder: None
    """Function that writes further files into the folder, such as tables over all cases."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the main libraries, by name."""
    versions = {"python": platform.python_version()}
    for name in REPORTED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> dict[str, Any] | None:
    """Return the commit of the checkout that the package runs from, and whether files differ from it.

    None: the package does not run from a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30, encoding="utf-8", errors="replace"
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def copies_of(ref: Ref | None, *names: str) -> list[FileCopy]:
    """Return copies of files of an artifact, with the same names in the run folder."""
    return [] if ref is None else [FileCopy(ref, name, name) for name in names]


def publish_run_folder(run: RunFolder, runner: Runner) -> dict[str, Figure]:
    """Write the run folder and return the headline figures, which are empty without ground truth.

    The folder is built under a temporary name and then moved into place. An earlier run folder of this name is
    replaced; files in it that no run wrote stay. Raise DiskFullError if the disk is full.
    """
    store = ArtifactStore()
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_as_user_error(run.path.parent), store.lock(f"run-{path_digest(run.path)}"):
        work = run.path.with_name(f".{run.path.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _copy_files(run.copies, work)
            run.write_more(work)
            _write_manifest(work, run, runner)
            _replace_folder(work, run.path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if (root := root_of(run.path)) is not None:
        with disk_full_as_user_error(root), store.lock(f"runs-{path_digest(root)}"):
            write_runs_page(root)
    return read_headline(run.path)


def ensure_writable(folder: Path) -> Path:
    """Return a run folder's absolute path after a check that its parent is writable.

    The check finds the problem now, not after a long training. Raise ConfigError if it fails.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{folder.parent}: cannot be written to ({error.strerror})") from error
    return folder


def path_digest(path: Path) -> str:
    """Return a digest of a path. It names the path's lock without revealing the path."""
    return hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]


def _copy_files(copies: Iterable[FileCopy], work: Path) -> None:
    """Copy the files. Links would let an edit in the run folder damage the cache."""
    for each in copies:
        source = each.ref.folder() / each.source
        files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
        for file in files:
            target = work / each.target / file.relative_to(source)
            if file.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                sync_path(target)


def _write_manifest(work: Path, run: RunFolder, runner: Runner) -> None:
    files = sorted(path for path in work.rglob("*") if path.is_file())
    settings = run.settings.public()
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "name": settings["name"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(run.seconds, 3),
        "settings": settings,
        "versions": installed_versions(),
        "git": git_commit(),
        **run.manifest(),
        "tasks": [asdict(record) for record in runner.records],
        "computed": runner.computed,
        "cached": runner.cached,
        "failures": [{"case": f.case_id, "stage": f.stage, "rule": f.rule} for f in runner.failures],
        "files": {
            path.relative_to(work).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        },
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync_path(work / MANIFEST)


def _replace_folder(work: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    if old.is_dir() and not final.exists():  # an earlier run was killed between the two moves below
        old.replace(final)
    shutil.rmtree(old, ignore_errors=True)
    sync_path(work)  # write to disk before the rename: a power cut leaves a complete folder or none
    if final.exists():
        final.replace(old)
    work.replace(final)
    sync_path(final.parent)
    if not old.is_dir():
        return
    written = {*_files_in_manifest(old), MANIFEST}
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        if path.is_file() and name not in written and not (final / name).exists():
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(final / name)
    shutil.rmtree(old, ignore_errors=True)


def _files_in_manifest(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
