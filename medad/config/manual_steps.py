"""The preprocessing steps that can be run by hand: one table for the command, the server's form and the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ManualStepName = Literal["window", "roi", "slice", "equalise"]


@dataclass(frozen=True)
class ManualStep:
    """What a form or a command says of a step."""

    description: str
    needs_liver: bool


MANUAL_STEPS: dict[ManualStepName, ManualStep] = {
    "window": ManualStep("HU to grey", needs_liver=False),
    "roi": ManualStep("the liver alone", needs_liver=True),
    "slice": ManualStep("axial slices", needs_liver=True),
    "equalise": ManualStep("each slice's histogram", needs_liver=False),
}
"""The order in which each step takes what the one before wrote."""
assert tuple(MANUAL_STEPS) == get_args(ManualStepName)

STEPS_HELP = "; ".join(f"{name}: {step.description}" for name, step in MANUAL_STEPS.items())
"""One line for people."""
