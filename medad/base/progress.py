"""LEAF: the progress of a training. This module does not import torch, so that any process can show progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a training phase. `step` counts from 1 over the whole phase. `loss` is that of the latest batch."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    seconds_left: float


OnProgress = Callable[[Progress], None]
