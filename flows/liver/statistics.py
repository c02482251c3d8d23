"""statistics.csv: one row per segmented case, with volumes, sizes and HU."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from flows.store.references import Ref
from medad.steps.results import CaseResult

FILE = "statistics.csv"
COLUMNS = (
    "case",
    "name",
    "liver_ml",
    "lesion_count",
    "lesion_ml",
    "largest_lesion_ml",
    "largest_diameter_mm",
    "largest_mean_hu",
)
"""Columns. `name` is the name of the user's file, or empty if names are hidden."""


def case_statistics(result: CaseResult[Ref], name: str = "") -> dict[str, Any]:
    """Return the row of a case: volumes in mL, the largest lesion's longest diameter in mm and mean HU."""
    assert result.segmented is not None, "a finished case is segmented"
    table = json.loads((result.segmented.folder() / "lesions.json").read_text(encoding="utf-8"))
    largest: dict[str, Any] = max(table["lesions"], key=lambda lesion: lesion["volume_mm3"], default={})
    return {
        "case": result.case_id,
        "name": name,
        "liver_ml": table["liver_ml"],
        "lesion_count": table["lesion_count"],
        "lesion_ml": table["lesion_ml"],
        "largest_lesion_ml": largest["volume_mm3"] / 1000 if largest else None,
        "largest_diameter_mm": largest.get("diameter_mm"),
        "largest_mean_hu": largest.get("mean_hu"),
    }


def statistics_table(results: Iterable[CaseResult[Ref]], names: Mapping[str, str]) -> str:
    """Return the table of all cases as CSV. `names` has the names to show, by case."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        row = case_statistics(result, names.get(result.case_id, ""))
        writer.writerow({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()
