"""LEAF: the base class of all settings, and their reader for YAML with one-line errors. zsad uses it too."""

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
"""`auto`: any GPU of this machine, or the CPU if it has no GPU. `cpu`: no GPU. A list: the GPUs with these numbers."""
Hours = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """Base class of settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def public(self, *leave_out: str) -> dict[str, Any]:
        """Return the values as JSON with private values hidden. Fields named in `leave_out` are missing."""
        return self.model_dump(mode="json", exclude=set(leave_out))


class TimeLimits(Settings):
    """Limits on the hours for which one task may use a device. A stopped training continues from its checkpoint."""

    training_hours: Hours = 96.0
    """Limit in hours for one training."""
    encoding_hours: Hours = 24.0
    """Limit in hours for encoding the images or prompts of one category."""
    inference_hours: Hours = 6.0
    """Limit in hours for segmenting or scoring one case or category."""
    waiting_hours: Hours = 120.0
    """Limit in hours for waiting for a device that other steps use. It is longer than the limit of a training."""


class MachineSettings(Settings):
    """The machine and the workers that a run uses. They do not change results, so they are in no cache key or
    report."""

    gpus: Gpus = "auto"
    """GPUs that may be used. `auto`: any GPU of this machine, or the CPU if it has no GPU. `cpu`: no GPU. A list: the
    GPUs with these numbers, such as `[0, 1]`."""
    engine: Literal["threads", "dask", "ray"] = "threads"
    """Engine that runs the tasks: threads of the flow's own process, or workers of a Dask or Ray cluster."""
    engine_address: str | None = None
    """Address of a running cluster (`tls://HOST:8786`, `ray://HOST:10001`). None: start one here for this run."""
    engine_workers: Annotated[int, Field(ge=1)] | None = None
    """Number of tasks that run at the same time. None: one per core, or fewer if memory is short."""
    limits: TimeLimits = TimeLimits()
    """Limits on the time for which one task may use a device."""

    @property
    def machine(self) -> MachineSettings:
        """Return only the machine settings, without the other settings of the run."""
        return MachineSettings.model_validate(self.model_dump(include=set(MACHINE_FIELDS)))

    @field_validator("gpus")
    @classmethod
    def _some_gpus_each_once(cls, gpus: Gpus) -> Gpus:
        if isinstance(gpus, tuple) and (not gpus or len(set(gpus)) < len(gpus)):
            raise ValueError("expected auto, cpu, or a list of GPU numbers without repetition")
        return gpus


MACHINE_FIELDS = frozenset(MachineSettings.model_fields)
ANY_MACHINE = MachineSettings()

S = TypeVar("S", bound=BaseModel)


def data_root(root: str, samples_dir: Path | None) -> Path:
    """Return the folder of a setting `root`: a path, or `samples:NAME` below `samples_dir`. Raises InputError."""
    if not root.startswith(SAMPLES_PREFIX):
        return Path(root).expanduser()
    name = root.removeprefix(SAMPLES_PREFIX)
    if samples_dir is None:
        raise InputError(root, "the sample data are missing; fetch them with `adflows samples`")
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
        Values by dotted key (`{"train.restoration.epochs": 3}`). They replace the file's values.

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
    """Change `values` in place by dotted key and return them. `source` names the settings in the error.

    Raises
    ------
    ConfigError
        A parent in a key is not a group of settings.
    """
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:  # missing, or written as null
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{source}: {key}: {parent} is not a group of settings")
        place[leaf] = value
    return values


def parse_settings(model: type[S], values: Mapping[str, Any], *, source: str) -> S:
    """Validate settings that were already read. `source` names them in the error. Raises ConfigError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        rule = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{source}: {key + ': ' if key else ''}{rule}{more}") from error
