"""LEAF: where a training is, for whoever watches it. Light, so that a watcher need not load torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a phase is. `step` counts from 1 within the whole phase; `loss` is the latest batch's."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    seconds_left: float


OnProgress = Callable[[Progress], None]
