"""The preprocessing steps that can be run by hand: one table for the command, the server's form and the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

HandStepName = Literal["window", "roi", "slice", "equalise"]


@dataclass(frozen=True)
class ByHand:
    """What a form or a command says of a step."""

    does: str
    needs_liver: bool


BY_HAND: dict[HandStepName, ByHand] = {
    "window": ByHand("HU to grey", needs_liver=False),
    "roi": ByHand("the liver alone", needs_liver=True),
    "slice": ByHand("axial slices", needs_liver=True),
    "equalise": ByHand("each slice's histogram", needs_liver=False),
}
"""The order in which each step takes what the one before wrote."""
assert tuple(BY_HAND) == get_args(HandStepName)

IN_ORDER = "; ".join(f"{name}: {step.does}" for name, step in BY_HAND.items())
"""One line for people."""
