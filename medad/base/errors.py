"""Errors a user can cause. Everything else is a bug and keeps its traceback.

`str(error)` is always one line that names the file and the rule it broke.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """Something only the user can mend; command lines print it on one line and exit with code 2."""


class InputError(UserError):
    """A file that cannot be used.

    Parameters
    ----------
    path
        The offending file or folder. Shown on the user's own terminal; reports and Prefect show the
        pseudonym instead, since paths on hospital shares may hold patient names.
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


@dataclass(frozen=True)
class CaseFailure:
    """A case, an image or a whole category that ended early at one step, and why."""

    case_id: str
    """Id that logs and reports show: of an image `CATEGORY/IMAGE`, of a whole category its name."""
    stage: str
    """Name of the step that failed."""
    rule: str
    """Rule that was broken: what was expected and what came, without the path."""
    path: str = field(default="", repr=False)
    """Offending file, or empty. It may hold a patient's name, so only the user's own terminal shows it."""
    category: str = ""
    """An image's category. Empty for a CT case and for a whole category."""
    group: str = ""
    """Row of the ablation or system of the comparison that failed. Empty where the failure concerns all."""
    bug: Exception | None = field(default=None, repr=False, compare=False)
    """Error that shows a fault of the program rather than of a file; it is raised once all else is done."""
    transient: bool = field(default=False, repr=False)
    """Whether the share did not answer, so that the same step may succeed at once."""
    machine_fault: bool = field(default=False, repr=False)
    """Whether the machine is to blame and no file (a full disk, a missing GPU), so that it may succeed later."""
    pseudonymous: bool = field(default=False, repr=False)
    """Whether the id hides the names of the case's files, so that reports must not show them."""

    @property
    def line(self) -> str:
        """One line for the user's own terminal."""
        return f"{self.path or self.case_id}: {self.rule}"

    @property
    def file(self) -> str:
        """Name of the offending file without its folders, or empty."""
        return Path(self.path).name
