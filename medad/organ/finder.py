"""The choice of a method that finds the liver, and its checked result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from medad.base.devices import pick_device
from medad.base.errors import InputError
from medad.ct.io import Volume
from medad.organ import builtin, external
from medad.organ.checks import check
from medad.organ.refine import dice

Method = Literal["built-in", "TotalSegmentator", "model"]
LEAST_AGREEMENT = 0.7
"""Agreement with the built-in method below which another tool's mask gets a note."""
UNTRUSTED = (
    "a TorchScript file is a program, which runs when it is loaded; if you trust whoever made it, give --trust "
    "(in an inbox: trust_liver_model: true; in Python: trust=True)"
)
OWN_MASK = "correct it or give another mask with --liver MASK"


@dataclass(frozen=True)
class Finder:
    """A method, and what its result depends on."""

    method: Method = "built-in"
    model: Path | None = None
    """Network of the method `model`: a TorchScript file or a MONAI bundle."""
    weights: tuple[str, ...] = ()
    """Names of TotalSegmentator's weights."""
    tool: external.TotalSegmentator | None = field(default=None, compare=False, metadata={"in_key": False})


@dataclass(frozen=True, eq=False)
class FoundLiver:
    """A liver mask in canonical order that passed the checks."""

    mask: Bool[ndarray, "X Y Z"]
    method: Method
    sureness: float
    """Agreement (Dice), 0..1: of the built-in method with itself, or of another tool with the built-in method."""
    millilitres: float
    notes: tuple[str, ...]
    """Lines for the report."""


def choose_finder(model: Path | None = None, *, trust: bool = False) -> Finder:
    """Return the given `model`, else TotalSegmentator if it is installed with weights, else the built-in method.

    A TorchScript file is a program that runs when it is loaded, so it needs `trust`. A bundle's weights are data.

    Raises
    ------
    InputError
        The path of the model contains no network, or a TorchScript file without `trust`.
    """
    if model is not None:
        if external.is_program(model) and not trust:
            raise InputError(model, UNTRUSTED)
        return Finder("model", model)
    tool = external.installed_totalsegmentator()
    return Finder() if tool is None else Finder("TotalSegmentator", weights=tool.names, tool=tool)


def find_liver(volume: Volume, finder: Finder, path: Path, device: str = "auto") -> FoundLiver:
    """Find the liver of a scan and check the mask.

    Parameters
    ----------
    path
        The scan's file, for messages.

    Raises
    ------
    InputError
        No liver was found, or the mask breaks a rule of `medad.organ.checks`.
    """
    spacing_mm = volume.geometry.canonical_spacing_mm
    notes = []
    mask: ndarray
    if finder.method == "built-in":
        found = builtin.find(volume.hu, spacing_mm)
        if found is None:
            raise InputError(path, f"{builtin.NOTHING}; {OWN_MASK}")
        mask, sureness = found.mask, found.sureness
        checked = check(volume.hu, mask, spacing_mm, sureness=sureness)
    else:
        mask = _run_other(finder, volume, device)
        found = builtin.find(volume.hu, spacing_mm)
        sureness = 0.0 if found is None else dice(mask, found.mask)
        checked = check(volume.hu, mask, spacing_mm)
        if sureness < LEAST_AGREEMENT:
            notes.append("the built-in method finds another liver")
    if checked.problems:
        raise InputError(path, f"the automatic liver mask is not plausible: {'; '.join(checked.problems)}; {OWN_MASK}")
    if not checked.whole:
        notes.append("the scan's first or last plane cuts the liver")
    return FoundLiver(np.ascontiguousarray(mask), finder.method, sureness, checked.millilitres, tuple(notes))


def _run_other(finder: Finder, volume: Volume, device: str) -> Bool[ndarray, "X Y Z"]:
    if finder.method == "TotalSegmentator":
        assert finder.tool is not None
        return external.run_totalsegmentator(finder.tool, volume, device)
    assert finder.model is not None
    place = pick_device(device)
    return external.run_model(external.load_model(finder.model, place), volume, place)
