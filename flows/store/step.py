"""Steps: functions of the domain whose results are kept, and calls of them, which know their own key.

A call's key follows from its arguments: an artifact counts by its digest, a file by its content, settings by their
values. Where and how fast a step runs (device, how much goes to it at a time, minutes between checkpoints) is no part
of a key. Every step registers itself where it is declared.
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
"""Every step that is declared, by name."""
PAGE = ("medad/reporting/page_style.html", "medad/reporting/page_end.html", "medad/reporting/failures.html")
"""Files that every report's page is made with, for the `files` of its step."""
Kind = Literal["training", "encoding", "inference"]
"""Names of the time limits of device steps."""


@dataclass(frozen=True)
class Keyed:
    """An argument that counts by something else than itself, as images by the digests of their files."""

    value: Any
    content: Any
    """JSON values and whatever else `content_of` takes."""


@dataclass(frozen=True)
class Place:
    """Where a call runs, and how much goes to the device at a time."""

    device: str
    """torch's name for it, in the process that runs the call: `cpu` or `cuda:0`."""
    batch_size: int
    report: Callable[..., None] = field(default=lambda *progress: None, compare=False)
    """Tells the flow's process how far the call is."""


@dataclass(frozen=True)
class Step:
    """A kind of computation whose results are kept. Calling it with the function's arguments gives a `Call`."""

    name: str
    version: int
    """Raised when the meaning of an artifact changes in a way its code's syntax tree does not show."""
    function: str
    """`package.module:function` of the domain. Its code, and what it reaches, is part of the key."""
    libraries: tuple[str, ...]
    """Distributions whose versions are part of the key."""
    kind: Kind | None = None
    """Set for a step that keeps a whole device busy: which of the time limits holds."""
    not_in_key: frozenset[str] = frozenset()
    """Arguments, or dotted fields of them, that change no result."""
    volatile: frozenset[str] = frozenset()
    """Files that tell of the making (timings) and not of the result: later steps do not depend on them."""
    files: tuple[str, ...] = ()
    """Other files of the packages that the code reads (templates), relative to the packages' parent."""
    before_devices: bool = False
    """Whether device steps follow it: the libraries for their processes are loaded meanwhile."""

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
        """Return everything a key is made of, by name; `inputs` are those of a call."""
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
    """A step with its arguments: it has a key, and it runs on an empty folder."""

    step: Step
    arguments: Mapping[str, Any]
    machine: MachineSettings = ANY_MACHINE
    """Devices and time limits of a device step."""
    batch_size: int = 1
    """How much goes to the device at a time, where memory allows it."""
    phase: str = ""
    """What a training is called where its progress is shown."""

    def inputs(self) -> dict[str, Any]:
        """Return everything the result depends on, as JSON values. Raises InputError for a file that cannot be read."""
        without = self.step.not_in_key
        return {name: content_of(value, without, name) for name, value in self.arguments.items() if name not in without}

    def parts(self) -> dict[str, Any]:
        """Return what the key is made of."""
        return self.step.key_parts(self.inputs())

    def refs(self) -> Iterator[Ref]:
        """Yield all artifacts among the arguments, however deep."""
        yield from _refs_in(self.arguments)

    def run(self, out: Path, place: Place, *, key: str) -> None:
        """Make the artifact in `out`. `key` names what may outlive a kill: a training's checkpoint."""
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
    """Return what an argument counts by in a key, as JSON values.

    Parameters
    ----------
    without
        Dotted names of fields that are left out.
    place
        Dotted name of `value`.

    Raises
    ------
    InputError
        A file cannot be read.
    ValueError
        A private setting would stand in the key, which is stored in clear: leave it out, and let its content count.
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
                raise ValueError(f"{dotted}: a private setting, and in no key but by its content")
            found[str(name)] = content_of(each, without, dotted)
        return found
    if isinstance(value, list | tuple):
        return [content_of(each, without, place) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(content_of(each, without, place) for each in value)
    return value


def keyed(value: Any, *without: str, **more: Any) -> Keyed:
    """Let a value count by its fields, some left out by dotted name, and by `more`."""
    return Keyed(value, content_of(value, frozenset(without)) | more)


def shown(settings: Settings) -> Keyed:
    """Let settings count by what a report shows of them."""
    return Keyed(settings, settings.public(*MACHINE_FIELDS))


def _fields_of(value: Any) -> Mapping[Any, Any] | None:
    """Return the fields of settings or of a dataclass, a mapping as it is; None for anything else."""
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
    """Return an argument as the function takes it: artifacts as their folders, keyed values as themselves."""
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
    """Give a file below the cache that survives kills, so that the same training goes on; gone once it has ended."""
    path = cache_root() / "checkpoints" / f"{step.name}-{key}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def load_steps(*packages: str) -> dict[str, Step]:
    """Import the modules of these packages that declare steps, whose names end so; return all known steps."""
    for package in packages:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.name.endswith("steps"):
                importlib.import_module(f"{package}.{module.name}")
    return dict(STEPS)
