"""The run folder: what a run leaves for people, copied out of the cache in one move.

runs/<flow>/<name>/report.html, report.json, preview.png
                   masks/<case>.nii.gz, probabilities/<case>.nii.gz    on each scan's own grid
                   planted/<case>/scan.nii.gz, label.nii.gz           where lesions were planted
                   model/restoration/, model/segmentation/            weights and training curve
                   manifest.json                                      what went in, what it took, what is here
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flows.cache import ArtefactStore, Ref, disk_full_is_told
from flows.digests import file_sha256
from flows.privacy import PrivateSettings
from flows.report_job import Reported
from flows.tasks import Tally
from medad.datasets import PLANTED_FILES
from medad.errors import ConfigError

MANIFEST = "manifest.json"
SCHEMA = "adflows run 1"
SHOWN_LIBRARIES = (
    "adflows",
    "prefect",
    "torch",
    "monai",
    "numpy",
    "scipy",
    "scikit-image",
    "nibabel",
    "SimpleITK",
    "safetensors",
)
HEADLINE = {
    "micro_dice_2d": "micro 2-D Dice",
    "dice_3d_mean": "3-D Dice, mean over cases",
    "voxel_auroc_mean": "voxel AUROC inside the liver",
}
"""Keys of the report's summary that are printed at the end of a run."""
PLANTED = "Planted lesions: these figures tell how well drawn-in lesions are found, not tumours."


@dataclass(frozen=True)
class UsedCase:
    """A case, and the artefact whose key holds its files' digests."""

    use: Literal["train", "test"]
    case_id: str
    ref: Ref


@dataclass(frozen=True)
class RunFolder:
    """What a run folder is made from."""

    path: Path
    settings: PrivateSettings
    used: tuple[UsedCase, ...]
    report: Ref | None
    results: tuple[Reported, ...]
    restoration: Ref | None
    segmentation: Ref | None
    seconds: float


def installed_versions() -> dict[str, str]:
    """Name -> version of Python and of what computes."""
    versions = {"python": platform.python_version()}
    for name in SHOWN_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether files differ from it; None without a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def publish(run: RunFolder, tally: Tally) -> dict[str, float | None]:
    """Write the run folder and return the headline figures (empty without truth).

    The folder is built beside its place and moved there whole. Files in an earlier folder of this name that the
    earlier run did not write are kept. Raises DiskFullError.
    """
    store = ArtefactStore()
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_is_told(run.path.parent), store.lock(f"run-{file_name_digest(run.path)}"):
        work = run.path.with_name(f".{run.path.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _fill(work, run)
            _write_manifest(work, run, tally)
            _swap(work, run.path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return read_headline(run.path)


def writable(folder: Path) -> Path:
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


def has_model(folder: Path) -> bool:
    """Whether a run folder holds trained networks."""
    return (folder / "model" / "segmentation" / "model.safetensors").is_file()


def file_name_digest(path: Path) -> str:
    """A name for a path's lock that tells nothing of the path."""
    return hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]


def _copy(ref: Ref | None, names: dict[str, str], work: Path) -> None:
    """Copy files of an artefact: name there -> name in the run folder. No links: an edit must not damage the cache."""
    for source, target in names.items():
        if ref is not None and (ref.folder() / source).is_file():
            (work / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ref.folder() / source, work / target)


def _fill(work: Path, run: RunFolder) -> None:
    _copy(run.report, {name: name for name in ("report.html", "report.json", "preview.png")}, work)
    for each in run.results:
        _copy(each.segmented, {"mask.nii.gz": f"masks/{each.case_id}.nii.gz"}, work)
        _copy(each.segmented, {"probability.nii.gz": f"probabilities/{each.case_id}.nii.gz"}, work)
        _copy(each.planted, {n: f"planted/{each.case_id}/{n}" for n in PLANTED_FILES}, work)
    for name, ref in (("restoration", run.restoration), ("segmentation", run.segmentation)):
        _copy(ref, {n: f"model/{name}/{n}" for n in ("model.safetensors", "curve.json")}, work)


def _write_manifest(work: Path, run: RunFolder, tally: Tally) -> None:
    store = ArtefactStore()
    inputs = []
    for used in run.used:
        made_from = store.sidecar(used.ref).parts["inputs"]
        digests = {name: made_from[name] for name in ("scan", "label")}
        inputs.append({"use": used.use, "case": used.case_id, "sha256": digests})
    files = sorted(path for path in work.rglob("*") if path.is_file())
    manifest = {
        "schema": SCHEMA,
        "name": run.settings.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(run.seconds, 3),
        "settings": run.settings.model_dump(mode="json"),
        "inputs": inputs,
        "versions": installed_versions(),
        "git": git_commit(),
        "models": {
            name: None if ref is None else {"key": ref.key, "digest": ref.digest}
            for name, ref in (("restoration", run.restoration), ("segmentation", run.segmentation))
        },
        "tasks": [asdict(record) for record in tally.records],
        "computed": tally.computed,
        "cached": tally.cached,
        "failures": [{"case": f.case_id, "stage": f.stage, "rule": f.rule} for f in tally.failures],
        "files": {
            path.relative_to(work).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        },
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _swap(work: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    if old.is_dir() and not final.exists():  # a predecessor was killed between the two moves below
        old.replace(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    work.replace(final)
    if not old.is_dir():
        return
    written = {*_files_of(old), MANIFEST}
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        if path.is_file() and name not in written and not (final / name).exists():
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(final / name)
    shutil.rmtree(old, ignore_errors=True)


def _files_of(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def read_headline(folder: Path) -> dict[str, float | None]:
    """The three figures that are printed, by their key in the report's summary; empty where nothing was evaluated."""
    summary = _report(folder).get("summary")
    return {} if summary is None else {key: summary[key] for key in HEADLINE}


def read_statement(folder: Path) -> str:
    """What must be said beside the figures; empty for real tumours."""
    return PLANTED if _report(folder).get("planted", {}).get("any") else ""


def settings_of_run(folder: Path) -> PrivateSettings:
    """The settings of a run folder. Raises ConfigError where it is none, or holds no model."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        settings = PrivateSettings.model_validate(manifest["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: not the folder of a run (no readable {MANIFEST})") from error
    for name in ("restoration", "segmentation"):
        if not (folder / "model" / name / "model.safetensors").is_file():
            raise ConfigError(f"{folder}: this run holds no trained {name} network")
    return settings
