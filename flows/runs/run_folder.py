"""The run folder: what a run leaves for people, copied out of the cache in one move.

runs/<flow>/<name>/report.html, report.json, preview.png and what else the flow says
                   manifest.json           what went in, what it took, what is here
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

from flows.runs.runner import Runner
from flows.store.artifacts import ArtifactStore
from flows.store.digests import file_sha256
from flows.store.references import Ref
from medad.base.errors import ConfigError
from medad.base.manifest import MANIFEST
from medad.base.settings import Settings
from medad.base.storage import disk_full_as_user_error, sync_path

MANIFEST_SCHEMA = "adflows run 1"
REPORTED_LIBRARIES = (
    "adflows",
    "prefect",
    "torch",
    "torchvision",
    "open_clip_torch",
    "monai",
    "numpy",
    "scipy",
    "scikit-image",
    "pillow",
    "nibabel",
    "SimpleITK",
    "safetensors",
)
HEADLINE = {
    # liver, inserted lesions
    "sensitivity": "lesion sensitivity at the fixed false-positive volume",
    # liver
    "micro_dice_2d": "micro 2-D Dice",
    "dice_3d_mean": "3-D Dice, mean over cases",
    "voxel_auroc_mean": "voxel AUROC inside the liver",
    # zsad, of the last system: mean over categories and seeds
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_aupro": "AUPRO",
}
"""Figures of a report that are printed at the end of a run, where it has them."""
INSERTED_NOTICE = "Inserted lesions: these figures tell how well drawn-in lesions are found, not tumours."


@dataclass(frozen=True)
class FileCopy:
    """A file of an artifact that the run folder gets."""

    ref: Ref
    source: str
    """Name in the artifact; a folder stands for all files in it. Left out where the artifact has none of this name."""
    target: str
    """Name in the run folder."""


@dataclass(frozen=True)
class RunFolder:
    """What a run folder is made from."""

    path: Path
    settings: Settings
    copies: tuple[FileCopy, ...]
    manifest: Callable[[], Mapping[str, Any]]
    """Gives what the flow adds to the manifest, as JSON values without any path: its inputs' digests, its models."""
    seconds: float


def installed_versions() -> dict[str, str]:
    """Name -> version of Python and of what computes."""
    versions = {"python": platform.python_version()}
    for name in REPORTED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether files differ from it; None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30, encoding="utf-8", errors="replace"
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def copies_of(ref: Ref | None, *names: str) -> list[FileCopy]:
    """These files of an artifact, under the same names."""
    return [] if ref is None else [FileCopy(ref, name, name) for name in names]


def publish_run_folder(run: RunFolder, runner: Runner) -> dict[str, float | None]:
    """Write the run folder and return the headline figures (empty without truth).

    The folder is built beside its place and moved there whole. Files in an earlier folder of this name that the
    earlier run did not write are kept. Raises DiskFullError.
    """
    store = ArtifactStore()
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_as_user_error(run.path.parent), store.lock(f"run-{path_digest(run.path)}"):
        work = run.path.with_name(f".{run.path.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _copy_files(run.copies, work)
            _write_manifest(work, run, runner)
            _replace_folder(work, run.path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return read_headline(run.path)


def ensure_writable(folder: Path) -> Path:
    """A run folder's absolute path, once its parent is known to take it: found now, not after a night of training.

    Raises ConfigError.
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
    """A name for a path's lock that tells nothing of the path."""
    return hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]


def _copy_files(copies: Iterable[FileCopy], work: Path) -> None:
    """Copies and no links: an edit in the run folder must not damage the cache."""
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
    if old.is_dir() and not final.exists():  # a predecessor was killed between the two moves below
        old.replace(final)
    shutil.rmtree(old, ignore_errors=True)
    sync_path(work)  # on the disk before it has its name: also a power cut leaves a whole folder or none
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


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def read_headline(folder: Path) -> dict[str, float | None]:
    """The figures that are printed, by key; empty where nothing was evaluated."""
    report = _read_report(folder)
    figures = report.get("summary") or {}
    if report.get("macro"):
        metrics = report["macro"][-1]["metrics"]
        figures = {key: None if stat is None else stat["mean"] for key, stat in metrics.items()}
    return {key: figures[key] for key in HEADLINE if key in figures}


def read_notices(folder: Path) -> list[str]:
    """What must be said beside the figures; empty where there is nothing of the kind."""
    report = _read_report(folder)
    if report.get("inserted", {}).get("any"):  # a report on livers
        return [*report.get("warnings", ()), INSERTED_NOTICE]
    notices = [notice["text"] for notice in report.get("notices", ()) if notice["kind"] != "published"]
    return [*notices, *report["notes"]] if "notices" in report else []


def read_notices_text(folder: Path) -> str:
    """The notices as one text."""
    return " ".join(read_notices(folder))
