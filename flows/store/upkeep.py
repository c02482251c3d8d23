"""Listing, explaining, checking and pruning the cache. Safe during runs, because the lock of each key is taken."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.store.artifacts import SIDECAR, ArtifactStore, Sidecar, files_digest
from flows.store.digests import file_sha256
from flows.store.step import STEPS, Step, content_key
from medad.base.errors import ConfigError

KEY_LENGTH = 64
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class CachedArtifact:
    """One artifact in the cache."""

    step: str
    key: str
    folder: Path
    size: int
    """Size of its files, bytes."""
    used: float
    """Time when it was made or last used by a run, seconds since 1970."""
    sidecar: Sidecar | None
    """Content of artifact.json. None: it cannot be read."""


@dataclass(frozen=True)
class Damage:
    """An artifact that does not match its sidecar."""

    artifact: CachedArtifact
    rule: str


@dataclass(frozen=True)
class Change:
    """One part of a key that differs: its dotted name and both values as text. A missing value is an empty text."""

    part: str
    before: str
    now: str

    @property
    def line(self) -> str:
        if not self.before or not self.now:
            return f"{self.part}: {'new' if self.now else 'removed'}"
        if _is_digest(self.before) or _is_digest(self.now):
            return f"{self.part} changed"
        return f"{self.part}: {self.before} -> {self.now}"


def list_artifacts(store: ArtifactStore, step: str | None = None) -> list[CachedArtifact]:
    """List the artifacts in the cache, of one step or of all, least recently used first."""
    found = []
    for folder in store.root.glob(f"{step or '*'}/*"):
        if len(folder.name) == KEY_LENGTH and folder.is_dir():
            with contextlib.suppress(FileNotFoundError):  # another process has pruned it
                found.append(_read_artifact(folder))
    return sorted(found, key=lambda each: (each.used, each.key))


def _read_artifact(folder: Path) -> CachedArtifact:
    try:
        sidecar = Sidecar.model_validate_json((folder / SIDECAR).read_bytes())
    except (OSError, ValidationError):
        sidecar = None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return CachedArtifact(folder.parent.name, folder.name, folder, size, folder.stat().st_mtime, sidecar)


def find(store: ArtifactStore, key: str) -> CachedArtifact:
    """Return the artifact whose key begins with `key`. Raises ConfigError unless exactly one does."""
    found = [each for each in list_artifacts(store) if each.key.startswith(key)]
    if len(found) != 1:
        raise ConfigError(
            f"{key}: {'no' if not found else len(found)} artifacts in {store.root} have a key that begins so"
        )
    return found[0]


def check(each: CachedArtifact) -> str | None:
    """Read every file of an artifact, and return what is damaged, or None."""
    sidecar = each.sidecar
    if sidecar is None:
        return f"{SIDECAR} cannot be read"
    if (sidecar.step, sidecar.key) != (each.step, each.key) or content_key(sidecar.parts) != each.key:
        return f"{SIDECAR} belongs to another artifact, or was changed"
    if sidecar.digest != files_digest(sidecar.files):
        return f"{SIDECAR} was changed"
    for name, entry in sidecar.files.items():
        try:
            if file_sha256(each.folder / name) != entry.sha256:
                return f"{name} was changed or is incomplete"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def find_damaged(
    store: ArtifactStore, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Damage]:
    """Check all artifacts, and return the damaged ones. Calls `on_progress` with the numbers done and in total."""
    everything = list_artifacts(store)
    found = []
    for done, each in enumerate(everything, 1):
        if (rule := check(each)) is not None and each.folder.is_dir():
            found.append(Damage(each, rule))
        on_progress(done, len(everything))
    return found


def choose_unused(
    everything: Iterable[CachedArtifact],
    *,
    older_than_s: float | None,
    max_bytes: int | None,
    now: float,
    in_use_since: float,
) -> list[CachedArtifact]:
    """Choose artifacts to remove: those unused for too long, then the least recently used until the rest fits.

    Parameters
    ----------
    everything
        Result of `list_artifacts`: least recently used first.
    older_than_s, max_bytes
        Limits of age and total size. None: no limit.
    now
        Current time, seconds since 1970. A time of use in the future, after a change of the clock, counts as now.
    in_use_since
        Artifacts used since this time are not removed, since a running flow may need them again. See
        `ArtifactStore.oldest_run_start`.
    """
    everything = list(everything)
    free = [each for each in everything if each.used < in_use_since]
    chosen = [] if older_than_s is None else [each for each in free if now - each.used > older_than_s]
    free = free[len(chosen) :]
    total = sum(each.size for each in everything) - sum(each.size for each in chosen)
    while max_bytes is not None and free and total > max_bytes:
        total -= free[0].size
        chosen.append(free.pop(0))
    return chosen


def remove(store: ArtifactStore, each: CachedArtifact) -> bool:
    """Remove an artifact. Returns False if a run is computing it or it no longer exists."""
    name = f"{each.step}-{each.key}"
    with store.lock(name, wait=False) as held:
        if not held or not each.folder.is_dir():
            return False
        doomed = store.root / "tmp" / f"{name}.old"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        each.folder.replace(doomed)  # atomic, so that no process sees half an artifact
        shutil.rmtree(doomed, ignore_errors=True)
    return True


def old_checkpoints(store: ArtifactStore, older_than_s: float, now: float) -> list[Path]:
    """Return the checkpoints of trainings that were stopped longer ago than this and not continued."""
    folder = store.root / CHECKPOINTS
    found = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    return [path for path in found if now - path.stat().st_mtime > older_than_s]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the differing parts of two keys, by dotted name."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        Change(name, old.get(name, ""), new.get(name, ""))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield all leaves by dotted name. A list is one leaf, since it may have thousands of digests."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(below, f"{name}.{key}" if name else str(key))
    else:
        text = str(value)
        yield name, text if len(text) <= KEY_LENGTH else content_key({"value": value})


def _is_digest(text: str) -> bool:
    return len(text) == KEY_LENGTH and set(text) <= set("0123456789abcdef")


def outdated(each: CachedArtifact) -> list[Change]:
    """Return the parts of an artifact's key that the current program would change. Empty if it is up to date.

    The steps must be loaded (`flows.store.step.load_steps`).
    """
    step = STEPS.get(each.step)
    if each.sidecar is None or step is None:
        return [Change("step", each.step, "")]
    parts = each.sidecar.parts
    return changes(parts, step.key_parts(parts["inputs"]))


def nearest(store: ArtifactStore, step: Step, parts: Mapping[str, Any]) -> list[Change] | None:
    """Return how a key differs from the most similar key of its step in the cache. None if the cache has none.

    Inputs that are digests have the largest weight: the same scan with another setting is nearer than another scan.
    """
    best: tuple[int, float, list[Change]] | None = None
    for each in list_artifacts(store, step.name):
        if each.sidecar is None:
            continue
        found = changes(each.sidecar.parts, parts)
        weight = sum(100 if change.part.startswith("inputs.") and _is_digest(change.before) else 1 for change in found)
        if best is None or (weight, -each.used) < best[:2]:
            best = (weight, -each.used, found)
    return None if best is None else best[2]


def days(seconds: float) -> str:
    """Return an age as text, such as `3 d`, `5 h` or `12 min`."""
    minutes = max(0, seconds) / 60
    for unit, size in (("d", 1440.0), ("h", 60.0)):
        if minutes >= 2 * size:
            return f"{minutes / size:.0f} {unit}"
    return f"{minutes:.0f} min"


def age(each: CachedArtifact) -> str:
    """Return the time since an artifact's last use in words."""
    return days(time.time() - each.used)
