"""The steps that find the liver of a scan and check a given mask, and functions that create their calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flows.store.digests import path_digest
from flows.store.step import Call, Keyed, Step

if TYPE_CHECKING:
    from medad.cohort.datasets import LabelledScan
    from medad.organ.finder import Finder

LIVER_MASK = Step(
    "liver-mask",
    1,
    "medad.steps.liver_mask:find_case_liver",
    ("nibabel", "numpy", "SimpleITK", "monai", "safetensors", "scipy", "torch"),
    files=("medad/organ/liver.safetensors",),
)
CHECK_LIVER = Step(
    "liver-check", 1, "medad.steps.liver_mask:check_case_liver", ("nibabel", "numpy", "SimpleITK", "scipy", "torch")
)


def liver_mask(scan: Path, finder: Finder, affine_from: str = "agree") -> Call:
    """Return the call that finds the liver of a scan."""
    model = []
    if finder.model is not None:
        from medad.steps.liver_mask import model_files

        model = [path_digest(file) for file in model_files(finder.model)]
    content = {"method": finder.method, "weights": list(finder.weights), "model": model}
    return LIVER_MASK(scan=scan, finder=Keyed(finder, content), affine_from=affine_from)


def check_liver(case: LabelledScan) -> Call:
    """Return the call that checks a liver mask given by the user."""
    return CHECK_LIVER(case=case)
