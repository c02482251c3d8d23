"""`adflows ids ...`: pseudonyms of scans, for forms and logs that must not hold a path."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import Json
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError

if TYPE_CHECKING:
    from flows.privacy.case_ids import RegisteredCase

app = typer.Typer(
    help="Pseudonyms of scans: what Prefect's forms take and its records show. Only you can read what they stand for.",
    no_args_is_help=True,
)

CaseId = Annotated[str, typer.Argument(metavar="ID", help="As `ids ls` shows it.")]


def _paths_and_labels(case: RegisteredCase) -> dict[str, Any]:
    liver = None if case.liver is None else str(case.liver)
    return {"scan": str(case.scan), "liver": liver, "liver_labels": list(case.liver_labels)}


def _printable(path: Path) -> str:
    """Also of a path that is no valid text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _files_exist(case: RegisteredCase) -> dict[str, bool | None]:
    return {"scan_there": case.scan.exists(), "liver_there": None if case.liver is None else case.liver.exists()}


@app.command()
def add(
    scans: Annotated[list[Path], typer.Argument(metavar="SCAN...", help="NIfTI, MHD, NRRD, or a DICOM folder.")],
    liver: Annotated[
        list[Path] | None, typer.Option("--liver", help="Liver mask on the scan's grid; once for each scan, in order.")
    ] = None,
    liver_label: Annotated[
        list[int] | None, typer.Option("--liver-label", help="Value(s) of liver in the mask; default 1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give scans an id and print it. The same scan has the same id again, wherever it lies."""
    terminal.enabled = True
    masks: list[Path | None] = list(liver or [])
    if masks and len(masks) != len(scans):
        raise ConfigError(f"{len(scans)} scans but {len(masks)} liver masks: give --liver once for each scan, in order")
    from flows.privacy.case_ids import register

    found = []
    for scan, mask in zip(scans, masks or [None] * len(scans), strict=True):
        case = register(scan, mask, tuple(liver_label or [1]))
        terminal.line(f"{case.id} is {_printable(case.scan)}")
        found.append(case.id)
        if not as_json:
            print_result(case.id)
    if as_json:
        print_result(json.dumps({"ids": found}))


@app.command(name="ls")
def list_command(
    paths: Annotated[bool, typer.Option("--paths", help="Show the paths as well.")] = False, as_json: Json = False
) -> None:
    """List the ids, and whether their files are still there."""
    from flows.privacy.case_ids import registered

    rows = [(case, _files_exist(case)) for case in registered()]
    if as_json:
        print_result(
            json.dumps(
                [{"id": case.id} | there | (_paths_and_labels(case) if paths else {}) for case, there in rows], indent=1
            )
        )
        return
    for case, there in rows:
        mask = {None: "no mask", True: "mask", False: "mask gone"}[there["liver_there"]]
        line = f"{case.id:<22} {'scan' if there['scan_there'] else 'scan gone':<10} {mask:<10}"
        print_result(f"{line} {_printable(case.scan)}" if paths else line.rstrip())


@app.command()
def which(case_id: CaseId, as_json: Json = False) -> None:
    """Say which scan an id stands for."""
    from flows.privacy.case_ids import which as which_case

    case = which_case(case_id)
    if as_json:
        print_result(json.dumps({"id": case.id} | _paths_and_labels(case), indent=1))
        return
    print_result(_printable(case.scan))
    if case.liver is not None:
        print_result(f"{_printable(case.liver)} (liver: {', '.join(map(str, case.liver_labels))})")


@app.command(name="rm")
def remove(case_id: CaseId) -> None:
    """Remove an id from the register. No scan is touched."""
    from flows.privacy.case_ids import forget

    forget(case_id)
    print_result(f"{case_id} is removed")
