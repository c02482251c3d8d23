"""The page of all runs, `runs/index.html`. Each run replaces it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

from flows.machine.stage import format_seconds
from flows.runs.headline import Figure, describe_data, read_headline
from medad.base.manifest import MANIFEST
from medad.base.storage import write_bytes

FLOWS = ("liver", "liver-ablate", "zsad", "zsad-compare", "zsad-train")
"""Folders of a root folder that have run folders."""
PAGE = "index.html"


@dataclass(frozen=True)
class RunRow:
    """One run in the table."""

    name: str
    flow: str
    created: str
    """Date and time of its end, UTC."""
    status: str
    sound: bool
    """Whether no case failed."""
    seconds: float
    headline: dict[str, Figure]
    data: str
    """Its cases, or its categories and images, in a few words."""
    link: str
    """Relative address of the report. Empty: it has none."""

    @property
    def time(self) -> str:
        return format_seconds(self.seconds)


def root_of(run: Path) -> Path | None:
    """Return the folder whose page lists a run folder ROOT/FLOW/NAME. None: the run lies elsewhere."""
    return run.parent.parent if run.parent.name in FLOWS else None


def write_runs_page(root: Path) -> None:
    """Write the page of the runs below a root folder."""
    from medad.reporting.page import page_environment

    rows = sorted(_rows(root), key=lambda row: row.created, reverse=True)
    figures = {key: figure.title for row in rows for key, figure in row.headline.items()}
    doc = SimpleNamespace(name="runs", notes=(), rows=rows, figures=figures)
    page = page_environment("medad.reporting").get_template("runs.html").render(doc=doc)
    write_bytes(root / PAGE, page.encode())


def _rows(root: Path) -> Iterator[RunRow]:
    for flow in FLOWS:
        for file in sorted((root / flow).glob(f"[!.]*/{MANIFEST}")):
            folder = file.parent
            try:
                manifest = json.loads(file.read_text(encoding="utf-8"))
                failed = len({each["case"] for each in manifest["failures"]})
                created, seconds = str(manifest["created"]), float(manifest["seconds"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is being replaced, or a person has changed it
            report = folder / "report.html"
            link = f"{flow}/{quote(folder.name)}/{report.name}" if report.is_file() else ""
            yield RunRow(
                name=folder.name,
                flow=flow,
                created=created[:16].replace("T", " "),
                status=f"{failed} failed" if failed else "done",
                sound=not failed,
                seconds=seconds,
                headline=read_headline(folder),
                data=describe_data(folder),
                link=link,
            )
