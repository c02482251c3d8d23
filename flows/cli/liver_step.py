"""`adflows liver step`: preprocessing steps on one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.copies import copy_result
from flows.cli.hand_request import hand_request
from flows.cli.header_options import AffineFrom, AffineMismatch, SpacingMm, header_settings
from flows.cli.liver_options import LiverLabel
from flows.cli.options import DryRun, Json, Quiet, Refresh, Verbose, prepare_command, print_and_exit, run_flow
from flows.cli.series import SeriesName, choose_scans
from medad.config.manual_steps import STEPS_HELP, ManualStepName


def step(
    name: Annotated[ManualStepName, typer.Argument(metavar="STEP", help=f"Step to run, in this order: {STEPS_HELP}.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="Output of the step before. For window: a CT scan. Or the pseudonym of a scan."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, or a folder for it.")],
    through: Annotated[
        ManualStepName | None, typer.Option("--through", metavar="STEP", help="Also run the steps up to this one.")
    ] = None,
    liver: Annotated[
        Path | None, typer.Option("--liver", help="Liver mask on the scan's grid. Needed by roi and slice.")
    ] = None,
    liver_label: LiverLabel = None,
    series_name: SeriesName = None,
    affine_from: AffineFrom = None,
    affine_mismatch: AffineMismatch = None,
    spacing_mm: SpacingMm = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a `preprocess` setting, e.g. slice_px=128. Repeatable."
        ),
    ] = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Run preprocessing steps on one file.

    Each step reads the file that the step before wrote, so the steps can be checked one by one. Window and roi write
    NIfTI; slice and equalise write safetensors. With --through, only the last result is written.

    INPUT can be a pseudonym from `adflows ids`. Then the steps before STEP run first, with the registered liver mask.
    If there is none, the liver is found.

    Runs without Prefect, unless PREFECT_API_URL names a server.
    """
    on_server = "PREFECT_API_URL" in os.environ
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    if source.exists():
        [source] = choose_scans([source], [liver], series_name)
    header = header_settings(affine_from, affine_mismatch, spacing_mm)
    request = hand_request(name, through, source, liver, liver_label, overrides, header)
    from flows.liver.hand_steps import hand_step

    outcome = run_flow(hand_step, dry_run=dry_run, local=not on_server, request=request, refresh=refresh)
    lines = []
    if (folder := outcome.details.pop("folder", None)) and not dry_run:
        written = copy_result(Path(folder), out)
        outcome.details["written"] = str(written)
        lines.append(f"wrote {written}")
    print_and_exit(outcome, as_json=as_json, lines=lines)
