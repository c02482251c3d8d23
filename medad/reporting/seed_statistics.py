"""Mean and standard deviation over seeds, and their text in reports."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Stat(BaseModel):
    """A mean over seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float
    sd: float | None
    """Sample standard deviation (ddof = 1). None below two seeds."""
    n: int
    """Number of seeds."""


def mean_and_sd(values: Iterable[float | None]) -> Stat | None:
    """Return mean and sample standard deviation. None: no values, or one is missing."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    if not numbers or len(numbers) != len(known):
        return None
    # exact: equal values give that value as mean, and a deviation of 0
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Stat(mean=statistics.mean(numbers), sd=sd, n=len(numbers))


def percent(stat: Stat | None) -> str:
    """Format a mean of fractions in percent, with its standard deviation if it has one."""
    if stat is None:
        return "–"
    return f"{100 * stat.mean:.1f}" + ("" if stat.sd is None else f" ± {100 * stat.sd:.1f}")


def percentage_points(difference: float | None) -> str:
    """Format a difference of fractions in percentage points, with its sign."""
    # adding 0 turns a rounded -0.0 into 0.0
    return "–" if difference is None else f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "−")
