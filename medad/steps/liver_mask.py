"""The step that finds the liver of a scan without a mask."""

from __future__ import annotations

import json
from pathlib import Path

from medad.ct.io import AffineFrom, Spacing, read_scan, write_mask
from medad.organ.external import model_files
from medad.organ.finder import Finder, choose_finder, find_liver

__all__ = ["CASE", "LIVER", "Finder", "choose_finder", "find_case_liver", "model_files"]

LIVER, CASE = "liver.nii.gz", "case.json"


def find_case_liver(
    scan: Path,
    finder: Finder,
    out: Path,
    *,
    affine_from: AffineFrom = "agree",
    spacing_mm: Spacing | None = None,
    device: str = "cpu",
) -> None:
    """Find the liver of a scan with the method `finder`.

    Writes liver.nii.gz (uint8, 1 in the liver, on the scan's own grid) and case.json: method, sureness (0..1), volume
    in mL and notes.

    Raises
    ------
    InputError
        The scan cannot be read, no liver was found, or its mask is not plausible.
    """
    volume = read_scan(scan, affine_from=affine_from, spacing_mm=spacing_mm)
    found = find_liver(volume, finder, scan, device)
    write_mask(out / LIVER, found.mask, volume.geometry)
    facts = {
        "method": found.method,
        "sureness": round(found.sureness, 3),
        "liver_ml": round(found.millilitres, 1),
        "notes": [*volume.notes, *found.notes],
    }
    (out / CASE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
