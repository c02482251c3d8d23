"""Tables for programs and papers: CSV with one line per row, and text escaped for LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medad.base.storage import write_bytes

_SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: "\\" + character for character in "&%$#_{}"},
    }
)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with equal keys as UTF-8 CSV with a header. None becomes an empty field. No rows: an empty file."""
    buffer = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(buffer, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    write_bytes(path, buffer.getvalue().encode())


def latex_escaped(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return text.translate(_SPECIAL)
