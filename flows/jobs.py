"""What every step of either flow is: what it depends on, and the one domain call it makes.

`inputs` gives everything the result depends on and nothing else: digests and the settings that matter. Where and how
fast a step runs (device, batch size of inference, minutes between checkpoints) is no part of a key. `run` may use only
what `inputs` shows.
"""

from __future__ import annotations

import abc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from flows.cache import ArtefactStore, Ref, Step, key_parts
from flows.gpu import device_slot
from medad.errors import InputError


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, remembered. Raises InputError."""
    try:
        return ArtefactStore().digests.get(path)
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from error


def json_values(settings: BaseModel, *leave_out: str) -> dict[str, Any]:
    """Settings as JSON values, for a key."""
    return settings.model_dump(mode="json", exclude=set(leave_out))


def digest_of(ref: Ref | None) -> str | None:
    return None if ref is None else ref.digest


def folder_of(ref: Ref | None) -> Path | None:
    return None if ref is None else ref.folder()


class Job(abc.ABC):
    """One step on one case (or category, or model): hashable in content, run on an empty folder."""

    step: ClassVar[Step]

    @abc.abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Everything the result depends on, as JSON values. Raises InputError for a file that cannot be read."""

    @abc.abstractmethod
    def run(self, out: Path, *, key: str) -> None:
        """Make the artefact in `out`. `key` names what may outlive a kill (a checkpoint)."""

    def make(self, out: Path, *, key: str) -> float:
        """`run`, once it may; returns when it began, by `time.monotonic`."""
        began = time.monotonic()
        self.run(out, key=key)
        return began

    def parts(self) -> dict[str, Any]:
        return key_parts(self.step, self.inputs())


class DeviceJob(Job):
    """A step that keeps a whole device busy: it waits for the device's slot and holds it while it runs."""

    device: str
    """As in the settings: auto, cpu, cuda or cuda:N."""

    @abc.abstractmethod
    def run_on(self, out: Path, device: str) -> None:
        """Make the artefact in `out` on this one device (cpu or cuda:N)."""

    def run(self, out: Path, *, key: str) -> None:
        self.make(out, key=key)

    def make(self, out: Path, *, key: str) -> float:
        with device_slot(self.device) as device:
            began = time.monotonic()
            self.run_on(out, device)
        return began


@dataclass(frozen=True)
class FailedStep:
    """A case that broke a rule: what a report says of it. No folder name: it may hold a patient's."""

    case_id: str
    stage: str
    rule: str
    file: str = ""
    category: str = ""
    """Of an image: what its id begins with."""
