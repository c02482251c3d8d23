"""Errors that a user can cause. Every other error is a bug and keeps its traceback.

`str(error)` is always one line that names the file and the broken rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """An error that only the user can fix. Commands print it on one line and exit with code 2."""


class InputError(UserError):
    """A file that cannot be used.

    Parameters
    ----------
    path
        The offending file or folder. Only the user's terminal shows it. Reports and Prefect show the case's pseudonym
        instead, because paths on hospital shares may contain patient names.
    rule
        The expected and the actual content, without the path.
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
    """A step that needed more time or memory than it may use."""


class DiskFullError(UserError):
    """A disk without room for an output. The incomplete output has been removed."""


@dataclass(frozen=True)
class CaseFailure:
    """A case, an image or a whole category that failed at one step, with the reason."""

    case_id: str
    """Id that logs and reports show. An image has the id `CATEGORY/IMAGE`, a whole category has its name."""
    stage: str
    """Name of the step that failed."""
    rule: str
    """Broken rule: the expected and the actual content, without the path."""
    path: str = field(default="", repr=False)
    """Offending file, or empty. The path may contain a patient's name, so only the user's terminal shows it."""
    category: str = ""
    """Category of the image. Empty for a CT case and for a whole category."""
    group: str = ""
    """Row of the ablation or system of the comparison that failed. Empty if the failure concerns all of them."""
    bug: Exception | None = field(default=None, repr=False, compare=False)
    """Error that shows a bug in the program, not a bad file. It is raised after all other work is done."""
    transient: bool = field(default=False, repr=False)
    """Whether a network share did not answer. The same step may succeed if it is repeated at once."""
    machine_fault: bool = field(default=False, repr=False)
    """Whether the machine caused the failure (a full disk, a missing GPU), not a file. The step may succeed later."""
    pseudonymous: bool = field(default=False, repr=False)
    """Whether the id hides the names of the case's files. Reports must not show those names."""

    @property
    def line(self) -> str:
        """Return one line for the user's terminal."""
        return f"{self.path or self.case_id}: {self.rule}"

    @property
    def file(self) -> str:
        """Return the name of the offending file without its folders, or an empty text."""
        return Path(self.path).name


GROUPED_FROM = 4
"""Number of equal problems of one category from which they are shown as one line with a count."""


def group_failures(failures: Iterable[CaseFailure]) -> list[list[CaseFailure]]:
    """Group equal problems of one category: equal step, and equal rule up to its colon and apart from numbers.

    Groups smaller than `GROUPED_FROM` are split up. The order is that of each group's first failure.
    """
    groups: dict[tuple[str, ...], list[CaseFailure]] = {}
    for one in failures:
        kind = kind_of_rule(one.rule) if one.category else one.line
        groups.setdefault((one.group, one.category, one.stage, kind), []).append(one)
    return [
        part
        for group in groups.values()
        for part in ([group] if len(group) >= GROUPED_FROM else [[one] for one in group])
    ]


def kind_of_rule(rule: str) -> str:
    """Return the part of a rule that equal problems share: the text up to the colon, without numbers."""
    return re.sub(r"\d+", "#", rule.partition(":")[0])


def group_lines(failures: Iterable[CaseFailure]) -> list[str]:
    """Return one line for each failure, or for each group of equal ones: the first with the number of the others."""
    return [
        group[0].line + (f" (and {len(group) - 1} more of this kind in {group[0].category})" if len(group) > 1 else "")
        for group in group_failures(failures)
    ]
