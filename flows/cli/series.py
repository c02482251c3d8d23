"""`adflows liver series`, and the option `--series`: the CT series of a DICOM export."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import Json, prepare_terminal
from flows.machine.terminal import print_result, terminal
from medad.base.errors import InputError

if TYPE_CHECKING:
    from medad.ct.dicom_series import Series

SeriesName = Annotated[
    str | None,
    typer.Option(
        "--series",
        metavar="SERIES",
        help="Series of a DICOM folder with several CT series: its number or key. `adflows liver series` lists them.",
    ),
]


def series(
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="DICOM folder, zip, DICOMDIR, or a file of a series.")],
    as_json: Json = False,
) -> None:
    """List the CT series of a DICOM export.

    Prints number, description, phase, kernel, thickness, slices and size of each series. `--series` of other commands
    takes the number or the key. What is not CT is counted in the last line.
    """
    prepare_terminal(as_json=as_json)
    from medad.ct.dicom_choice import is_series, split_path
    from medad.ct.dicom_series import find_series

    base, _ = split_path(scan.absolute())
    if not base.exists():
        raise InputError(scan, "no such file or folder")
    if not is_series(base):
        raise InputError(scan, "not a DICOM export")
    found = find_series(base)
    if as_json:
        print_result(json.dumps({"series": [each.row for each in found.series], "passed_over": found.passed_over}))
        return
    for line in table_lines(found.series):
        print_result(line)
    if found.note:
        print_result(found.note)


def table_lines(found: Iterable[Series]) -> list[str]:
    """Return a table of series as lines of text."""
    rows = [each.row for each in found]
    if not rows:
        return []
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = ["  ".join(name.ljust(width) for name, width in widths.items())]
    lines += ["  ".join(row[name].ljust(width) for name, width in widths.items()) for row in rows]
    return [line.rstrip() for line in lines]


def choose_scans(scans: Sequence[Path], masks: Sequence[Path | None], name: str | None) -> list[Path]:
    """Return the series of each scan. A scan without a choice stays as it is, and its reading reports why.

    Prints the series of an export of which none could be chosen, and what was passed over.
    """
    from flows.liver.series import SeriesChooser
    from medad.ct.dicom_choice import SeveralSeriesError, choose_series, is_series

    choose = SeriesChooser(name=name)
    chosen = []
    for scan, mask in zip(scans, masks, strict=True):
        path = scan.absolute()
        try:
            path = choose(path, mask)
            if is_series(path) and (note := choose_series(path)[1].note):
                terminal.line(f"{scan}: {note}")
        except SeveralSeriesError as error:
            for line in table_lines(error.series):
                terminal.line(line)
            if name is not None:
                raise
        except InputError:
            pass  # the step that reads the scan says so too
        chosen.append(path)
    return chosen
