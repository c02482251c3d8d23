"""What the cache holds: listing, explaining, checking and pruning it. Safe beside runs: each key's lock is taken."""

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
    """Bytes of its files."""
    used: float
    """When it was made or last served a run, seconds since 1970."""
    sidecar: Sidecar | None
    """None where artifact.json cannot be read."""


@dataclass(frozen=True)
class Damage:
    """An artifact that is not what its sidecar says."""

    artifact: CachedArtifact
    rule: str


@dataclass(frozen=True)
class Change:
    """One part of a key that differs: `part` by dotted name, and both values as text; empty where it is absent."""

    part: str
    before: str
    now: str

    @property
    def line(self) -> str:
        if not self.before or not self.now:
            return f"{self.part}: {'new' if self.now else 'gone'}"
        if _is_digest(self.before) or _is_digest(self.now):
            return f"{self.part} changed"
        return f"{self.part}: {self.before} -> {self.now}"


def list_artifacts(store: ArtifactStore, step: str | None = None) -> list[CachedArtifact]:
    """Everything that the cache holds, of one step or of all, oldest use first."""
    found = []
    for folder in store.root.glob(f"{step or '*'}/*"):
        if len(folder.name) == KEY_LENGTH and folder.is_dir():
            with contextlib.suppress(FileNotFoundError):  # pruned by another process meanwhile
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
    """The artifact whose key begins so. Raises ConfigError where there is none, or more than one."""
    found = [each for each in list_artifacts(store) if each.key.startswith(key)]
    if len(found) != 1:
        raise ConfigError(f"{key}: {'no' if not found else len(found)} artifacts in {store.root} have such a key")
    return found[0]


def check(each: CachedArtifact) -> str | None:
    """What is wrong with an artifact, every file read anew; None where it is whole."""
    sidecar = each.sidecar
    if sidecar is None:
        return f"{SIDECAR} cannot be read"
    if (sidecar.step, sidecar.key) != (each.step, each.key) or content_key(sidecar.parts) != each.key:
        return f"{SIDECAR} is another's, or was altered"
    if sidecar.digest != files_digest(sidecar.files):
        return f"{SIDECAR} was altered"
    for name, entry in sidecar.files.items():
        try:
            if file_sha256(each.folder / name) != entry.sha256:
                return f"{name} was altered or cut short"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def find_damaged(
    store: ArtifactStore, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Damage]:
    """Check all artifacts; `on_progress` is told how many of how many are done."""
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
    """What to remove: all that was not used for so long, then the longest unused until the rest fits.

    Parameters
    ----------
    everything
        As `list_artifacts` gives it: oldest use first.
    older_than_s, max_bytes
        None: no such limit.
    now
        Seconds since 1970. A use in the future (a clock that went back) counts as just now.
    in_use_since
        What was used since then stays: a run under way may come back to it (`ArtifactStore.oldest_run_start`).
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
    """Remove an artifact; False where a run is at work on it or it is gone."""
    name = f"{each.step}-{each.key}"
    with store.lock(name, wait=False) as held:
        if not held or not each.folder.is_dir():
            return False
        doomed = store.root / "tmp" / f"{name}.old"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        each.folder.replace(doomed)  # whole or not at all, also for one who looks meanwhile
        shutil.rmtree(doomed, ignore_errors=True)
    return True


def old_checkpoints(store: ArtifactStore, older_than_s: float, now: float) -> list[Path]:
    """Checkpoints of trainings that were stopped so long ago and never taken up again."""
    folder = store.root / CHECKPOINTS
    found = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    return [path for path in found if now - path.stat().st_mtime > older_than_s]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The parts of two keys that differ, by dotted name."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        Change(name, old.get(name, ""), new.get(name, ""))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Leaves by dotted name; of lists of digests (which may be thousands) the list as a whole."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(below, f"{name}.{key}" if name else str(key))
    else:
        text = str(value)
        yield name, text if len(text) <= KEY_LENGTH else content_key({"value": value})


def _is_digest(text: str) -> bool:
    return len(text) == KEY_LENGTH and set(text) <= set("0123456789abcdef")


def outdated(each: CachedArtifact) -> list[Change]:
    """Return what today's program would do otherwise than the one that made an artifact; empty where it still serves.

    Steps must have been loaded (`flows.store.step.load_steps`).
    """
    step = STEPS.get(each.step)
    if each.sidecar is None or step is None:
        return [Change("step", each.step, "")]
    parts = each.sidecar.parts
    return changes(parts, step.key_parts(parts["inputs"]))


def nearest(store: ArtifactStore, step: Step, parts: Mapping[str, Any]) -> list[Change] | None:
    """How a key differs from the most similar one that the cache holds of its step; None where it holds none.

    Inputs that are digests weigh most: the same scan under another setting is nearer than another scan.
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
    """An age as `3 d`, `5 h` or `12 min`."""
    minutes = max(0, seconds) / 60
    for unit, size in (("d", 1440.0), ("h", 60.0)):
        if minutes >= 2 * size:
            return f"{minutes / size:.0f} {unit}"
    return f"{minutes:.0f} min"


def age(each: CachedArtifact) -> str:
    """Since its last use."""
    return days(time.time() - each.used)
