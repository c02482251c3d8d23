"""What a run shows in Prefect's UI: a table of cases, the metrics, a picture. No path of an input, no patient data."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.privacy import PLACEHOLDER
from flows.publish import HEADLINE, read_statement
from flows.tasks import Tally

LARGEST_PICTURE_BYTES = 2_000_000
"""An artifact is one row of Prefect's database."""


def show_run(folder: Path, tally: Tally, *, private: bool) -> None:
    """Create the artifacts. A server that refuses one does not fail a run whose results are on disk."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {"cases": [], "summary": None}
    table = _table(report, tally)
    markdown = _markdown(report, read_statement(folder), PLACEHOLDER if private else str(folder / "report.html"), tally)
    picture = folder / "preview.png"
    try:
        create_table_artifact(table=table, key="liver-cases", description="Cases of this run")
        create_markdown_artifact(markdown=markdown, key="liver-report")
        if picture.is_file() and picture.stat().st_size <= LARGEST_PICTURE_BYTES:
            url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
            create_image_artifact(image_url=url, key="liver-preview", description="Slices of one case")
    except Exception as error:  # whatever a server or the way to it can raise
        get_run_logger().warning("artifacts could not be shown: %s", type(error).__name__)


def _table(report: dict[str, Any], tally: Tally) -> list[dict[str, Any]]:
    rows = []
    for case in report["cases"]:
        metrics = case.get("metrics") or {}
        rows.append(
            {
                "case": case["case_id"],
                "status": "done",
                "3-D Dice": _figure(metrics.get("dice_3d")),
                "voxel AUROC": _figure(metrics.get("voxel_auroc")),
                "rule": "",
            }
        )
    rows += [
        {"case": f.case_id, "status": f"failed: {f.stage}", "3-D Dice": "", "voxel AUROC": "", "rule": f.rule}
        for f in tally.failures
    ]
    return rows


def _markdown(report: dict[str, Any], statement: str, where: str, tally: Tally) -> str:
    lines = [f"Report: `{where}` (open it from the disk; browsers do not follow links to files)", ""]
    if report["summary"] is not None:
        lines += [statement, ""] if statement else []
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {name} | {_figure(report['summary'][key])} |" for key, name in HEADLINE.items()]
    lines += ["", f"{tally.computed} tasks computed, {tally.cached} cached, {len(tally.failures)} failed."]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
