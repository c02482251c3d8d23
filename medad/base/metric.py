"""LEAF: one metric, as all tables, definitions and headlines name it. zsad uses it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One row of a table of metrics."""

    key: str
    """Name in report.json and in CSV tables."""
    title: str
    """Name in tables. That of an image or pixel metric begins with its level."""
    level: str
    """Unit that is judged: image, pixel, slice, voxel, lesion or case."""
    meaning: str
    """Definition: formula, better direction, and when it is undefined. `{name}` stands for a setting's value."""
    value: Callable[[Any], float | None]
    """Function from the record of an evaluation to the metric. None: undefined."""
    higher_is_better: bool = True
    fraction: bool = True
    """Whether tables show it in percent."""
    column: bool = True
    """Whether tables with many rows have a column for it."""
    headline: bool = False
    """Whether it is printed at the end of a run."""

    @property
    def heading(self) -> str:
        """Return the title with a capital letter."""
        return self.title[0].upper() + self.title[1:]

    @property
    def short_title(self) -> str:
        """Return the title without the level that it begins with."""
        return self.title.removeprefix(f"{self.level} ")
