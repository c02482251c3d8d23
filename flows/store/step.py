"""What every step of either flow is: what it depends on, and the one domain call it makes.

`inputs` gives everything the result depends on and nothing else: digests and the settings that matter. Where and how
fast a step runs (device, batch size of inference, minutes between checkpoints) is no part of a key. `run` may use only
what `inputs` shows.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from flows.store.artifacts import ArtefactStore, Made, Ref, Step, key_parts
from medad.base.errors import InputError
from medad.base.settings import MachineSettings

if TYPE_CHECKING:
    from flows.devices.child import Place

PAGE = ("medad/reporting/page_style.html", "medad/reporting/page_end.html")
"""What every report's page is made with, for the `files` of its step."""


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, remembered. Raises InputError."""
    try:
        return ArtefactStore().digests.get(path)
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from error


def json_values(settings: BaseModel, *leave_out: str) -> dict[str, Any]:
    """Return settings as JSON values with nothing withheld, for a key.

    Keys are stored beside artefacts: leave out what is private, and put digests of the content in its place.
    """
    values: dict[str, Any] = to_jsonable_python(settings.model_dump(exclude=set(leave_out)))
    return values


def digest_of(ref: Ref | None) -> str | None:
    return None if ref is None else ref.digest


def folder_of(ref: Ref | None) -> Path | None:
    return None if ref is None else ref.folder()


class Job(abc.ABC):
    """One step on one case (or category, or model): hashable in content, run on an empty folder."""

    step: ClassVar[Step]
    before_devices: ClassVar[bool] = False
    """Whether device steps follow it: the libraries for their processes are loaded meanwhile."""

    @abc.abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Everything the result depends on, as JSON values. Raises InputError for a file that cannot be read."""

    @abc.abstractmethod
    def run(self, out: Path, *, key: str) -> None:
        """Make the artefact in `out`. `key` names what may outlive a kill (a checkpoint)."""

    def make(self, out: Path, *, key: str) -> Made | None:
        """`run`, wherever it is to run."""
        self.run(out, key=key)
        return None

    def parts(self) -> dict[str, Any]:
        return key_parts(self.step, self.inputs())


class DeviceJob(Job):
    """A step that keeps a whole device busy: it runs in a process of its own, which holds the device's slot."""

    kind: ClassVar[Literal["training", "encoding", "inference"]]
    """Which of the settings' time limits is its."""
    machine: MachineSettings

    @property
    @abc.abstractmethod
    def batch_size(self) -> int:
        """How much goes to the device at a time where memory allows it."""

    @abc.abstractmethod
    def run_on(self, out: Path, place: Place) -> None:
        """Make the artefact in `out`, in the step's own process; see `flows.devices.child`."""

    def watch(self) -> AbstractContextManager[Callable[..., None]]:
        """In the flow's process: what to do with the progress that `run_on` reports."""
        return nullcontext(lambda *progress: None)

    def run(self, out: Path, *, key: str) -> None:
        self.make(out, key=key)

    def make(self, out: Path, *, key: str) -> Made:
        from flows.devices.child import compute

        return compute(self, out, key)


@dataclass(frozen=True)
class FailedStep:
    """A case that broke a rule: what a report says of it. No folder name: it may hold a patient's."""

    case_id: str
    stage: str
    rule: str
    file: str = ""
    category: str = ""
    """Of an image: what its id begins with."""
