"""The headline figures of a run, and the notices that must stand beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEADLINE = {
    # liver, inserted lesions
    "sensitivity": "lesion sensitivity at the fixed false-positive volume",
    # liver
    "micro_dice_2d": "micro 2-D Dice",
    "dice_3d_mean": "3-D Dice, mean over cases",
    "voxel_auroc_mean": "voxel AUROC inside the liver",
    # zsad, of the last system: mean over categories and seeds
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_aupro": "AUPRO",
}
"""Figures that are printed at the end of a run, if its report has them: key -> title."""
INSERTED_NOTICE = "Inserted lesions: these figures say how well inserted lesions are found, not tumours."


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def read_headline(folder: Path) -> dict[str, float | None]:
    """Return the headline figures of a run folder, by key. Empty if nothing was evaluated."""
    report = _read_report(folder)
    figures = report.get("summary") or {}
    if report.get("macro"):
        metrics = report["macro"][-1]["metrics"]
        figures = {key: None if stat is None else stat["mean"] for key, stat in metrics.items()}
    return {key: figures[key] for key in HEADLINE if key in figures}


def read_notices(folder: Path) -> list[str]:
    """Return the notices that must be printed with the figures."""
    report = _read_report(folder)
    if report.get("inserted", {}).get("any"):  # a liver report
        return [*report.get("warnings", ()), INSERTED_NOTICE]
    notices = [notice["text"] for notice in report.get("notices", ()) if notice["kind"] != "published"]
    return [*notices, *report["notes"]] if "notices" in report else []


def read_notices_text(folder: Path) -> str:
    """Return the notices as one text, one line each."""
    return "\n".join(read_notices(folder))
