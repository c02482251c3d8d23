"""Schedule of a training: its number of steps and epochs, and the learning rate of each step."""

from __future__ import annotations

from math import ceil, cos, pi

from medad.config.training import PhaseSettings

RISING_SHARE, START_DIVISOR = 0.3, 25
"""One-cycle schedule: the share of steps in which the rate rises, and the ratio of its peak to its start."""


def steps_per_epoch(phase: PhaseSettings, slices: int) -> int:
    """Return the number of batches that visit all slices once. The last batch may be smaller."""
    return ceil(slices / phase.batch_size)


def total_steps(phase: PhaseSettings, slices: int) -> int:
    """Return the number of steps of a training: `steps` if it is set, or else those of `epochs` epochs."""
    return phase.steps or phase.epochs * steps_per_epoch(phase, slices)


def total_epochs(phase: PhaseSettings, slices: int) -> int:
    """Return the number of epochs that are begun. With `steps`, the last one may be incomplete."""
    return ceil(total_steps(phase, slices) / steps_per_epoch(phase, slices))


def learning_rate(phase: PhaseSettings, step: int, steps: int) -> float:
    """Return the learning rate of step `step`, 0..steps-1.

    It depends on the position only, so a resumed training continues with the right rate.
    """
    if phase.rate == "constant":
        return phase.learning_rate
    peak = max(round(RISING_SHARE * steps), 1)
    if step < peak:
        start = phase.learning_rate / START_DIVISOR
        return start + (phase.learning_rate - start) * (1 - cos(pi * step / peak)) / 2
    return phase.learning_rate * (1 + cos(pi * (step - peak) / max(steps - peak, 1))) / 2
