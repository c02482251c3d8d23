"""LEAF: the base of every settings object, and reading them from YAML with one-line errors. Also used by `zsad`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from medad.base.errors import ConfigError, InputError
from medad.base.private import SAMPLES_PREFIX

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Gpus = Literal["auto", "cpu"] | tuple[Annotated[int, Field(ge=0)], ...]
"""`auto`: any GPU of this machine, the CPU where it has none; `cpu`; or the numbers of the GPUs that may be used."""
Hours = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def public(self, *leave_out: str) -> dict[str, Any]:
        """Return the values as JSON, all that is private withheld, without the fields named in `leave_out`."""
        return self.model_dump(mode="json", exclude=set(leave_out))


class TimeLimits(Settings):
    """Hours for which one task may hold a device. A training that was ended goes on from its checkpoint."""

    training_hours: Hours = 96.0
    """Hours for one training."""
    encoding_hours: Hours = 24.0
    """Hours for encoding the images or prompts of one category."""
    inference_hours: Hours = 6.0
    """Hours for segmenting or scoring one case or category."""


class MachineSettings(Settings):
    """Where and with what a run computes. Nothing of it decides a result, so nothing of it is in a key or a report."""

    gpus: Gpus = "auto"
    """GPUs that may be used. `auto`: any of this machine, or the CPU where it has none. `cpu`: no GPU. A list: the
    GPUs of these numbers."""
    engine: Literal["threads", "dask", "ray"] = "threads"
    """Workers that run the tasks: threads of the flow's process, or those of a Dask or Ray cluster."""
    engine_address: str | None = None
    """Address of a running cluster (`tcp://HOST:8786`, `ray://HOST:10001`). None: start one here for this run."""
    engine_workers: Annotated[int, Field(ge=1)] | None = None
    """Tasks at a time. None: one per core, as far as memory allows."""
    limits: TimeLimits = TimeLimits()
    """Limits on the time for which one task may hold a device."""

    @property
    def machine(self) -> MachineSettings:
        """These settings alone, without those of the run they belong to."""
        return MachineSettings.model_validate(self.model_dump(include=set(MACHINE_FIELDS)))

    @field_validator("gpus")
    @classmethod
    def _some_gpus_each_once(cls, gpus: Gpus) -> Gpus:
        if isinstance(gpus, tuple) and (not gpus or len(set(gpus)) < len(gpus)):
            raise ValueError("expected auto, cpu, or a list of numbers of GPUs, each once")
        return gpus


MACHINE_FIELDS = frozenset(MachineSettings.model_fields)
ANY_MACHINE = MachineSettings()

S = TypeVar("S", bound=BaseModel)


def data_root(root: str, samples_dir: Path | None) -> Path:
    """The folder that a setting `root` names: a path, or `samples:NAME` below `samples_dir`. Raises InputError."""
    if not root.startswith(SAMPLES_PREFIX):
        return Path(root).expanduser()
    name = root.removeprefix(SAMPLES_PREFIX)
    if samples_dir is None:
        raise InputError(root, "the sample data are not at hand; fetch them first")
    if not name or Path(name).name != name or name in (".", ".."):
        raise InputError(root, "expected samples:NAME with the name of one folder")
    return samples_dir / name


def load_settings(model: type[S], path: Path, overrides: Mapping[str, Any] | None = None) -> S:
    """Read a YAML configuration.

    Parameters
    ----------
    model
        The settings class.
    path
        The YAML file.
    overrides
        Values by dotted key (`{"train.restoration.epochs": 3}`), put over the file's.

    Raises
    ------
    ConfigError
        The file is missing, is not YAML, or breaks a rule: one line with the file, the key and the rule.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top level")
    return parse_settings(model, apply_overrides(values, overrides or {}, source=str(path)), source=str(path))


def apply_overrides(values: dict[str, Any], overrides: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """`values`, changed, with others put over them by dotted key; `source` names them in the error.

    Raises
    ------
    ConfigError
        A key leads through a value that is no group of settings.
    """
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:  # not there, or written as null
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{source}: {key}: {parent} holds no further keys")
        place[leaf] = value
    return values


def parse_settings(model: type[S], values: Mapping[str, Any], *, source: str) -> S:
    """Validate settings already read; `source` names them in the error. Raises ConfigError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        rule = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{source}: {key + ': ' if key else ''}{rule}{more}") from error
