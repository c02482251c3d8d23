"""Artifacts of a run in Prefect's UI: a table of cases, the metrics and a picture.

They contain no path of an input and no patient data.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from flows.machine.environment import LOCAL_HOSTS, runs_root
from flows.runs.headline import read_headline, read_notices_text
from flows.runs.runner import Runner
from medad.base.text import PLACEHOLDER

REPORTS = "/reports"
"""Path of the runs' reports on the server of `adflows serve`."""
MAX_PICTURE_BYTES = 2_000_000
"""Size limit of a picture. An artifact is stored as one row of Prefect's database."""


@dataclass(frozen=True)
class UiLayout:
    """The layout of one flow's artifacts."""

    flow: str
    """Beginning of the artifacts' keys: lower-case letters and digits."""
    table: str
    """Key and description of the table."""
    first_column: str
    """First column of the table, which names the case or category. It is shown even if everything failed."""
    picture_caption: str
    """Description of preview.png."""
    rows: Callable[[dict[str, Any]], list[dict[str, Any]]]
    """Function from report.json to the rows of the table, one per case or category."""
    show_ids: bool = True
    """Whether failures are shown with their ids. False if an id is a file's name, which may be private."""


def _liver_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for case in report.get("cases", []):
        metrics = case.get("metrics") or {}
        rows.append(
            {
                "case": case["case_id"],
                "status": "done",
                "3-D Dice": format_figure(metrics.get("dice_3d")),
                "micro 2-D Dice": format_figure(case.get("micro_dice_2d")),
                "voxel AUROC": format_figure(metrics.get("voxel_auroc")),
                "rule": "",
            }
        )
    return rows


def _zsad_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for category in report.get("categories", []):
        variant = category["variants"][-1]
        row = {"category": category["name"], "status": "done", "images": len(category["images"])}
        for key in ("image_auroc", "pixel_auroc", "pixel_aupro"):
            stat = variant["metrics"].get(key)
            row[report["metrics"][key]] = format_figure(None if stat is None else stat["mean"])
        rows.append(row | {"rule": ""})
    return rows


def _zsad_score_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    counts = [len(category["images"]) for category in report.get("categories", [])]
    return [{"images": "scored", "status": "done", "count": count, "rule": ""} for count in counts]


def _compare_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for system in report.get("systems", []):
        row = {"system": system["name"], "status": "done"}
        for key in ("image_auroc", "pixel_auroc", "pixel_aupro"):
            stat = ((system.get("mean") or {}).get("metrics") or {}).get(key)
            row[report["metrics"][key]] = format_figure(None if stat is None else stat["mean"])
        rows.append(row | {"rule": ""})
    return rows


def _ablation_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in report.get("rows", []):
        shown: dict[str, Any] = {"row": row["name"], "status": f"{len(row['seeds'])} seeds"}
        for key in ("micro_dice_2d", "dice_3d_mean", "voxel_auroc_mean"):
            stat = row["stats"].get(key)
            shown[report["figures"][key]] = format_figure(None if stat is None else stat["mean"])
        rows.append(shown | {"rule": ""})
    return rows


def _sensitivity_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in report.get("by_size", []):
        low, high = row["size_mm"]
        figures = row["figures"]
        rows.append(
            {
                "size": f"{low:g}-{high:g} mm",
                "status": "done",
                **{key: figures[key] for key in ("inserted", "found")},
                "sensitivity": format_figure(figures["sensitivity"]),
                "rule": "",
            }
        )
    return rows


LIVER = UiLayout("liver", "cases", "case", "Slices of one case", _liver_rows)
SENSITIVITY = UiLayout("liver-sensitivity", "sizes", "size", "Sensitivity by size and contrast", _sensitivity_rows)
ZSAD = UiLayout("zsad", "categories", "category", "Images and their heat maps", _zsad_rows)
COMPARE = UiLayout("zsad-compare", "systems", "system", "Image and pixel AUROC of all systems", _compare_rows)
ABLATION = UiLayout("liver-ablation", "rows", "row", "Dice and AUROC of all rows", _ablation_rows)
ZSAD_SCORE = UiLayout("zsad-score", "images", "images", "Images and their heat maps", _zsad_score_rows, show_ids=False)


def create_run_artifacts(layout: UiLayout, folder: Path, runner: Runner, *, private: bool) -> None:
    """Create the artifacts of a run. They show the folder's path unless it is `private`."""
    from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    table = _table(layout, layout.rows(report), runner)
    markdown = _markdown(folder, _report_line(folder, private=private), runner)
    picture, name = folder / "preview.png", layout.flow
    create_table_artifact(table=table, key=f"{name}-{layout.table}", description=f"{layout.table} of this run")
    create_markdown_artifact(markdown=markdown, key=f"{name}-report")
    if picture.is_file() and picture.stat().st_size <= MAX_PICTURE_BYTES:
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(image_url=url, key=f"{name}-preview", description=layout.picture_caption)


def create_table(key: str, description: str, rows: list[dict[str, Any]]) -> None:
    """Create a single table."""
    from prefect.artifacts import create_table_artifact

    create_table_artifact(table=rows, key=key, description=description)


def _table(layout: UiLayout, rows: list[dict[str, Any]], runner: Runner) -> list[dict[str, Any]]:
    """Return the rows of finished cases, then those of failed ones, with the same columns."""
    first = layout.first_column
    columns = dict.fromkeys(rows[0] if rows else (first, "status", "rule"), "")
    failed = [
        {first: f.case_id if layout.show_ids else f"failed {n}", "status": f"failed: {f.stage}", "rule": f.rule}
        for n, f in enumerate(runner.failures, start=1)
    ]
    return rows + [columns | row for row in failed]


def _report_line(folder: Path, *, private: bool) -> str:
    """Return where the report is: a link if the server of the run shows it, else its file and how to open it."""
    if private:
        return f"Report: `{PLACEHOLDER}` (open this file in a browser)"
    if (address := report_address(folder)) is not None:
        return f"[Open the report]({address}) (the browser asks for the server's secret: user and password)"
    return f"Report: `{folder / 'report.html'}` (open this file in a browser, or run `adflows open` with its folder)"


def report_address(folder: Path) -> str | None:
    """Return the address of a run's report on this machine's server. None: the server does not show this folder."""
    from flows.runs.temporary_server import temporary_url

    api = os.environ.get("PREFECT_API_URL")
    if not api or api == temporary_url() or urlsplit(api).hostname not in LOCAL_HOSTS:
        return None
    try:
        parts = folder.resolve().relative_to(runs_root().resolve()).parts
    except ValueError:
        return None
    origin = (os.environ.get("PREFECT_UI_URL") or api.removesuffix("/api")).rstrip("/")
    return "/".join([f"{origin}{REPORTS}", *map(quote, parts), "report.html"])


def _markdown(folder: Path, where: str, runner: Runner) -> str:
    lines = [where, ""]
    statement = read_notices_text(folder)
    lines += [statement, ""] if statement else []
    if headline := read_headline(folder):
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {title} | {format_figure(value)} |" for title, value in headline.values()]
    lines += ["", f"{runner.computed} tasks computed, {runner.cached} cached, {len(runner.failures)} failed."]
    return "\n".join(lines)


def format_figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
