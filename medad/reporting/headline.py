"""The headline of a report: the few figures that a command prints at its end and that the page of runs shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict

from medad.base.metric import Metric


class Headline(BaseModel):
    """One figure of the headline."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    key: str
    title: str
    value: float | None
    """The figure. None: undefined."""


def headline_of(metrics: Iterable[Metric], value: Callable[[Metric], float | None]) -> tuple[Headline, ...]:
    """Return the figures of the metrics that are headlines."""
    return tuple(Headline(key=each.key, title=each.title, value=value(each)) for each in metrics if each.headline)
