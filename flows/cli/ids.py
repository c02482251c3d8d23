"""`adflows ids ...`: pseudonyms of scans, for forms and logs that must not contain a path."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import Json, example, prepare_terminal
from flows.cli.series import SeriesName, choose_scans
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError

if TYPE_CHECKING:
    from flows.privacy.case_ids import RegisteredCase

app = typer.Typer(
    help="""Manage the pseudonyms of scans.

    A pseudonym replaces the name of one scan in Prefect's forms, logs and reports. The register that maps pseudonyms to
    files is on this machine, in $ADFLOWS_PRIVATE. Only its owner can read it.
    """,
    epilog=example("adflows ids add scan.nii.gz", "adflows ids ls --paths"),
    no_args_is_help=True,
)

Pseudonym = Annotated[str, typer.Argument(metavar="PSEUDONYM", help="Pseudonym of a scan. `ids ls` prints all.")]


def _paths_and_labels(case: RegisteredCase) -> dict[str, Any]:
    liver = None if case.liver is None else str(case.liver)
    return {"scan": str(case.scan), "liver": liver, "liver_labels": list(case.liver_labels)}


def _printable(path: Path) -> str:
    """Return a path as text, even if its bytes are not valid text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _files_exist(case: RegisteredCase) -> dict[str, bool | None]:
    from medad.ct.dicom_choice import split_path

    there = split_path(case.scan)[0].exists()
    return {"scan_there": there, "liver_there": None if case.liver is None else case.liver.exists()}


@app.command(epilog=example("adflows ids add scan.nii.gz --liver liver.nii.gz"))
def add(
    scans: Annotated[list[Path], typer.Argument(metavar="SCAN", help="Scans: NIfTI, MHD or NRRD files, or DICOM.")],
    liver: Annotated[
        list[Path] | None,
        typer.Option("--liver", help="Liver mask on the scan's grid. Give it once per scan, in the same order."),
    ] = None,
    liver_label: Annotated[
        list[int] | None,
        typer.Option("--liver-label", help="Value of liver in the masks. Repeatable. Default: its only value, 1."),
    ] = None,
    series_name: SeriesName = None,
    as_json: Json = False,
) -> None:
    """Give scans pseudonyms and print them.

    Records each scan, and its liver mask if given, in the register of this machine. The pseudonym depends on the
    scan's content: the same scan in another place gets the same pseudonym.
    """
    prepare_terminal(as_json=as_json)
    masks: list[Path | None] = list(liver or [])
    if masks and len(masks) != len(scans):
        raise ConfigError(f"{len(scans)} scans but {len(masks)} liver masks: give --liver once for each scan, in order")
    from flows.privacy.case_ids import register

    found = []
    masks = masks or [None] * len(scans)
    for scan, mask in zip(choose_scans(scans, masks, series_name), masks, strict=True):
        case = register(scan, mask, tuple(liver_label or ()))
        terminal.line(f"{case.id} is {_printable(case.scan)}")
        found.append(case.id)
        if not as_json:
            print_result(case.id)
    if as_json:
        print_result(json.dumps({"ids": found}))


@app.command(name="ls", epilog=example("adflows ids ls --paths"))
def list_command(
    paths: Annotated[bool, typer.Option("--paths", help="Also print the paths of the scans.")] = False,
    as_json: Json = False,
) -> None:
    """List the pseudonyms.

    Says for each pseudonym whether the files of its scan and mask still exist.
    """
    from flows.privacy.case_ids import registered

    rows = [(case, _files_exist(case)) for case in registered()]
    if as_json:
        print_result(
            json.dumps(
                [{"id": case.id} | there | (_paths_and_labels(case) if paths else {}) for case, there in rows], indent=1
            )
        )
        return
    if not rows:
        print_result("no pseudonyms yet; adflows ids add SCAN gives one")
    for case, there in rows:
        mask = {None: "no mask", True: "mask", False: "mask missing"}[there["liver_there"]]
        line = f"{case.id:<22} {'scan' if there['scan_there'] else 'scan missing':<12} {mask:<12}"
        print_result(f"{line} {_printable(case.scan)}" if paths else line.rstrip())


@app.command(epilog=example("adflows ids which ct-4f1b2c3d5e6a"))
def which(case_id: Pseudonym, as_json: Json = False) -> None:
    """Print the scan that has this pseudonym.

    Prints the path of the scan, and of its liver mask if it has one.
    """
    from flows.privacy.case_ids import look_up

    case = look_up(case_id)
    if as_json:
        print_result(json.dumps({"id": case.id} | _paths_and_labels(case), indent=1))
        return
    print_result(_printable(case.scan))
    if case.liver is not None:
        print_result(f"{_printable(case.liver)} (liver: {', '.join(map(str, case.liver_labels)) or 'its only value'})")


@app.command(name="rm", epilog=example("adflows ids rm ct-4f1b2c3d5e6a"))
def remove(case_id: Pseudonym) -> None:
    """Remove a pseudonym from the register.

    The files of the scan stay as they are.
    """
    from flows.privacy.case_ids import forget

    forget(case_id)
    print_result(f"{case_id} is removed")
