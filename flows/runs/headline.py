"""The headline figures of a run, and the notices that must stand beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from medad.base.text import list_names


class Figure(NamedTuple):
    """One figure of the headline."""

    title: str
    value: float | None
    """The figure. None: undefined."""


INSERTED_NOTICE = "Inserted lesions: these figures say how well inserted lesions are found, not tumours."


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def read_headline(folder: Path) -> dict[str, Figure]:
    """Return the headline figures of a run folder, by key. Empty if nothing was evaluated."""
    return {each["key"]: Figure(each["title"], each["value"]) for each in _read_report(folder).get("headline", ())}


def describe_data(folder: Path) -> str:
    """Return what a run has worked on in a few words: the number of cases, or categories and images."""
    report = _read_report(folder)
    categories = report.get("categories")
    if categories:
        names = list_names([each["name"] for each in categories])
        images = sum(len(each.get("images", ())) for each in categories)
        return f"{names}: {images} images" if images else names
    counts = {"case": report.get("cases") or report.get("scans"), "row": report.get("rows")}
    return ", ".join(f"{len(found)} {name}{'' if len(found) == 1 else 's'}" for name, found in counts.items() if found)


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
