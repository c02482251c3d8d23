"""Errors a user can cause. Everything else is a bug and keeps its traceback.

`str(error)` is always one line that names the file and the rule it broke.
"""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Something only the user can mend; command lines print it on one line and exit with code 2."""


class InputError(UserError):
    """A file that cannot be used.

    Parameters
    ----------
    path
        The offending file or folder. Shown on the user's own terminal; reports and Prefect show the
        opaque case id instead, since paths on hospital shares may hold patient names.
    rule
        What was expected and what came, without the path.
    """

    def __init__(self, path: Path | str, rule: str) -> None:
        self.path = Path(path)
        self.rule = " ".join(rule.split())
        super().__init__(f"{self.path}: {self.rule}")

    def __reduce__(self) -> tuple[type[InputError], tuple[Path, str]]:
        return type(self), (self.path, self.rule)


class ConfigError(UserError):
    """A configuration file or option that breaks a rule."""


class LimitError(UserError):
    """The time or the memory that a step may use was not enough for it."""


class DiskFullError(UserError):
    """There was no room left to write an output; what was half-written has been removed."""
