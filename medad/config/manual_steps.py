"""The preprocessing steps that can be run by hand. The command, the server's form and the steps share this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ManualStepName = Literal["window", "roi", "slice", "equalise"]


@dataclass(frozen=True)
class ManualStep:
    """A preprocessing step as the form and the command describe it."""

    description: str
    needs_liver: bool


MANUAL_STEPS: dict[ManualStepName, ManualStep] = {
    "window": ManualStep("HU to grey", needs_liver=False),
    "roi": ManualStep("zeros outside the liver", needs_liver=True),
    "slice": ManualStep("axial slices", needs_liver=True),
    "equalise": ManualStep("histogram equalisation of each slice", needs_liver=False),
}
"""Steps by name, in their order. Each step reads the output of the step before it."""
assert tuple(MANUAL_STEPS) == get_args(ManualStepName)

STEPS_HELP = "; ".join(f"{name}: {step.description}" for name, step in MANUAL_STEPS.items())
"""All steps and their descriptions on one line, for help texts."""
