"""The scans that a model has experience with, and the ways in which another scan differs from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from medad.classifier.features import LiverStack, bright_parts_and_noise

_VESSEL_PERCENTILE = 98.0
"""Percentile of the white top-hat transform in the liver that measures the contrast of vessels."""


class ScanFacts(BaseModel):
    """Facts about a scan that matter to a model."""

    model_config = ConfigDict(frozen=True)

    liver_hu: float
    """Median HU of the liver."""
    vessel_hu: float
    """Contrast of bright vessels to the liver, in HU."""
    noise_hu: float
    """Robust standard deviation of the noise in prepared slices, in HU."""
    plane_mm: float
    """Distance between planes, in mm."""


_RULES = (
    ("liver_hu", "median of the liver", "HU", 15.0),
    ("vessel_hu", "contrast of vessels", "HU", 8.0),
    ("noise_hu", "noise", "HU", 2.0),
    ("plane_mm", "distance between planes", "mm", 0.5),
)
"""Field, name, unit, and distance from the range of the training scans from which a scan is unusual."""


def scan_facts(stack: LiverStack, liver_hu: float, plane_mm: float) -> ScanFacts:
    """Measure a scan. `stack` is its liver, `liver_hu` the median HU, `plane_mm` the distance between planes."""
    bright, noise_hu = bright_parts_and_noise(stack)
    return ScanFacts(
        liver_hu=round(liver_hu, 1),
        vessel_hu=round(float(np.percentile(bright, _VESSEL_PERCENTILE)), 1),
        noise_hu=round(noise_hu, 2),
        plane_mm=round(plane_mm, 2),
    )


def outside_experience(scan: ScanFacts, trained: Sequence[ScanFacts]) -> list[str]:
    """Return one sentence for each fact of a scan that is far from those of all training scans.

    If facts of no training scan are known, nothing is returned.
    """
    found: list[str] = []
    if not trained:
        return found
    for field, name, unit, tolerance in _RULES:
        values = [getattr(each, field) for each in trained]
        value, low, high = getattr(scan, field), min(values), max(values)
        if not low - tolerance <= value <= high + tolerance:
            found.append(
                f"outside the model's experience: {name} {value:g} {unit}; training scans: {low:g} to {high:g} {unit}"
            )
    return found
