"""Steps, which are functions with cached results, and calls of steps, which compute their key.

A call's key follows from its arguments: an artifact counts by its digest, a file by its content, and settings by their
values. The key does not contain where and how fast a step runs: device, batch size, minutes between checkpoints. Every
step registers itself when it is declared.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from flows.machine.environment import cache_root, package_parent
from flows.store.code import code_digest
from flows.store.digests import file_sha256, path_digest
from flows.store.references import Ref, canonical_json, library_versions
from medad.base.private import private_fields
from medad.base.settings import ANY_MACHINE, MACHINE_FIELDS, MachineSettings, Settings

STEPS: dict[str, Step] = {}
"""All declared steps, by name."""
PAGE = tuple(f"medad/reporting/{name}" for name in ("base.html", "parts.html", "page.css", "tables.js"))
"""Template files that all reports use, for the `files` of their steps."""
Kind = Literal["training", "encoding", "inference"]
"""Kind of a device step, which selects its time limit."""


@dataclass(frozen=True)
class Keyed:
    """An argument with separate content for the key, such as images with the digests of their files."""

    value: Any
    content: Any
    """JSON values, or other values that `content_of` accepts."""


@dataclass(frozen=True)
class Place:
    """The device that a call runs on, and its batch size."""

    device: str
    """torch's name of the device in the process that runs the call: `cpu` or `cuda:0`."""
    batch_size: int
    report: Callable[..., None] = field(default=lambda *progress: None, compare=False)
    """Function that reports the progress of the call to the flow's process."""


@dataclass(frozen=True)
class Step:
    """A computation with cached results. Calling a step with its function's arguments returns a `Call`."""

    name: str
    version: int
    """Number to increase if the meaning of an artifact changes but the digest of its code does not."""
    function: str
    """`package.module:function` of the domain. Its code and all code that it reaches are part of the key."""
    libraries: tuple[str, ...]
    """Names of libraries with their versions in the key."""
    kind: Kind | None = None
    """Kind of a step that uses a whole device, which selects its time limit. None: it needs no device."""
    not_in_key: frozenset[str] = frozenset()
    """Arguments, or dotted names of their fields, that do not affect the result."""
    volatile: frozenset[str] = frozenset()
    """Files about the computation, such as timings, instead of its result. Later steps do not depend on them."""
    files: tuple[str, ...] = ()
    """Other files that the code reads, such as templates, relative to the parent folder of the packages."""
    before_devices: bool = False
    """Whether device steps follow this step. If so, their processes already load libraries while it runs."""

    reads: bool = False
    """Whether this step reads files of others. Then it runs in a process of its own, which may crash."""

    def __post_init__(self) -> None:
        if STEPS.setdefault(self.name, self) != self:
            raise ValueError(f"two steps are called {self.name}")

    def __call__(
        self, *, machine: MachineSettings = ANY_MACHINE, batch_size: int = 1, phase: str = "", **arguments: Any
    ) -> Call:
        return Call(self, arguments, machine, batch_size, phase)

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def key_parts(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parts of a key, by name. `inputs` are those of a call."""
        return {
            "step": self.name,
            "version": self.version,
            "code": code_digest(self.function),
            "files": [file_sha256(package_parent() / name) for name in self.files],
            "libraries": library_versions(self.libraries),
            "inputs": dict(inputs),
        }


@dataclass(frozen=True)
class Call:
    """A step with its arguments. It has a key, and it writes its artifact into an empty folder."""

    step: Step
    arguments: Mapping[str, Any]
    machine: MachineSettings = ANY_MACHINE
    """Devices and time limits of a device step."""
    batch_size: int = 1
    """Number of items that the device processes at a time, if memory allows it."""
    phase: str = ""
    """Name of a training in the display of its progress."""

    def inputs(self) -> dict[str, Any]:
        """Return all inputs that the result depends on, as JSON values. Raises InputError if a file cannot be read."""
        without = self.step.not_in_key
        return {name: content_of(value, without, name) for name, value in self.arguments.items() if name not in without}

    def parts(self) -> dict[str, Any]:
        """Return the parts of the key."""
        return self.step.key_parts(self.inputs())

    def refs(self) -> Iterator[Ref]:
        """Yield all artifacts in the arguments, at any depth."""
        yield from _refs_in(self.arguments)

    def run(self, out: Path, place: Place, *, key: str) -> None:
        """Write the artifact into `out`. `key` names a training's checkpoint, which survives a killed process."""
        function = self.step.load()
        offered: dict[str, Any] = {
            "out": out,
            "device": place.device,
            "largest_batch": place.batch_size,
            "on_progress": place.report,
        }
        takes = inspect.signature(function).parameters
        given = {name: value for name, value in offered.items() if name in takes}
        given |= {name: _as_argument(value) for name, value in self.arguments.items()}
        if "checkpoint" not in takes or "checkpoint" in given:
            function(**given)
            return
        with _checkpoint(self.step, key) as checkpoint:
            function(**given, checkpoint=checkpoint)


def content_key(parts: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of `Step.key_parts`, hex."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def content_of(value: Any, without: frozenset[str] = frozenset(), place: str = "") -> Any:
    """Return the content of an argument for a key, as JSON values.

    Parameters
    ----------
    without
        Dotted names of fields to leave out.
    place
        Dotted name of `value`.

    Raises
    ------
    InputError
        A file cannot be read.
    ValueError
        A private setting would be in the key, which is stored in plain text. Use the digest of its content instead.
    """
    if isinstance(value, Keyed):
        return content_of(value.content, without, place)
    if isinstance(value, Ref | Path):
        return value.digest if isinstance(value, Ref) else path_digest(value)
    below = _fields_of(value)
    if below is not None:
        found = {}
        for name, each in below.items():
            dotted = f"{place}.{name}" if place else str(name)
            if dotted in without:
                continue
            if isinstance(value, BaseModel) and each is not None and name in private_fields(type(value)):
                raise ValueError(f"{dotted}: a private setting, which a key may only contain as a digest")
            found[str(name)] = content_of(each, without, dotted)
        return found
    if isinstance(value, list | tuple):
        return [content_of(each, without, place) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(content_of(each, without, place) for each in value)
    return value


def keyed(value: Any, *without: str, **more: Any) -> Keyed:
    """Return a value with its fields and `more` as content for a key, `without` some fields (dotted names)."""
    return Keyed(value, content_of(value, frozenset(without)) | more)


def shown(settings: Settings) -> Keyed:
    """Return settings with the fields that a report shows as content for a key."""
    return Keyed(settings, settings.public(*MACHINE_FIELDS))


def _fields_of(value: Any) -> Mapping[Any, Any] | None:
    """Return the fields of settings or a dataclass, or a mapping itself. None for all other values."""
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value) if each.metadata.get("in_key", True)}
    return value if isinstance(value, Mapping) else None


def _refs_in(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, Keyed):
        yield from _refs_in((value.value, value.content))
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _refs_in(each)
    elif not isinstance(value, BaseModel) and (below := _fields_of(value)) is not None:
        for each in below.values():
            yield from _refs_in(each)


def _as_argument(value: Any) -> Any:
    """Return an argument for the step's function: artifacts become folders, and keyed values plain values."""
    if isinstance(value, Keyed):
        return _as_argument(value.value)
    if isinstance(value, Ref):
        return value.folder()
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(_as_argument, value))
    if isinstance(value, Mapping):
        return {name: _as_argument(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {each.name: _as_argument(getattr(value, each.name)) for each in fields(value) if each.init}
        return replace(value, **changed)
    return value


@contextlib.contextmanager
def _checkpoint(step: Step, key: str) -> Iterator[Path]:
    """Yield a checkpoint file in the cache, so that a killed training can continue. It is removed on success."""
    path = cache_root() / "checkpoints" / f"{step.name}-{key}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def load_steps(*packages: str) -> dict[str, Step]:
    """Import all modules of these packages whose names end with `steps`, and return all declared steps."""
    for package in packages:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.name.endswith("steps"):
                importlib.import_module(f"{package}.{module.name}")
    return dict(STEPS)
