"""The step that finds the liver of a scan, and the function that creates its calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.store.digests import path_digest
from flows.store.step import Call, Keyed, Step
from medad.config.header import HeaderSettings

if TYPE_CHECKING:
    from medad.organ.finder import Finder

LIVER_MASK = Step(
    "liver-mask",
    1,
    "medad.steps.liver_mask:find_case_liver",
    ("nibabel", "numpy", "pydicom", "SimpleITK", "monai", "safetensors", "scipy", "torch"),
    files=("medad/organ/liver.safetensors",),
    reads=True,
)

LIVER_FILE, FOUND_LABELS = "liver.nii.gz", (1,)
"""Mask in the artifact of `LIVER_MASK`, and its value of liver."""


def liver_mask(scan: Path, finder: Finder, header: HeaderSettings) -> Call:
    """Return the call that finds the liver of a scan."""
    return LIVER_MASK(
        scan=scan,
        finder=Keyed(finder, finder_content(finder)),
        affine_from=header.affine_from,
        spacing_mm=header.spacing_mm,
    )


def finder_content(finder: Finder) -> dict[str, Any]:
    """Return what the result of a method depends on, for a key. Raises InputError if its network cannot be read."""
    model = []
    if finder.model is not None:
        from medad.steps.liver_mask import model_files

        model = [path_digest(file) for file in model_files(finder.model)]
    return {"method": finder.method, "weights": list(finder.weights), "model": model}
