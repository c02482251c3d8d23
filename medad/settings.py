"""LEAF: the base of every settings object, and reading them from YAML with one-line errors. Also used by `zsad`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medad.errors import ConfigError, InputError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class Settings(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=BaseModel)
SAMPLES_PREFIX = "samples:"


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
    for key, value in (overrides or {}).items():
        *parents, leaf = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{path}: {key}: {parent} holds no further keys")
        place[leaf] = value
    return parse_settings(model, values, source=str(path))


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
