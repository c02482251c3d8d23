"""`adflows liver mask`: the liver mask of one scan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.copies import copy_result
from flows.cli.header_options import AffineFrom, SpacingMm, header_settings
from flows.cli.options import DryRun, Json, Quiet, Refresh, Verbose, prepare_command, print_and_exit, run_flow
from flows.cli.series import SeriesName, choose_scans

LiverModel = Annotated[
    Path | None,
    typer.Option("--liver-model", help="Network that finds the liver: a TorchScript file or a MONAI bundle."),
]

Trust = Annotated[
    bool,
    typer.Option("--trust", help="Load a TorchScript file as --liver-model. It is a program, which runs here."),
]


def mask(
    scan: Annotated[
        Path, typer.Argument(metavar="SCAN", help="NIfTI, MHD or NRRD file, or DICOM (folder, zip, or one file).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Mask to write (.nii.gz), or a folder for liver.nii.gz.")],
    liver_model: LiverModel = None,
    trust: Trust = False,
    series_name: SeriesName = None,
    affine_from: AffineFrom = None,
    spacing_mm: SpacingMm = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Find the liver in a CT and write its mask.

    Uses --liver-model if it is given, else TotalSegmentator if it is installed with weights, else the built-in method.
    Prints the method, its sureness (0 to 1) and the volume. Look at the mask before you use it.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    from flows.liver.flow import LiverMaskRequest, liver_mask

    [scan] = choose_scans([scan], [None], series_name)
    request = LiverMaskRequest(
        scan=scan,
        liver_model=None if liver_model is None else liver_model.absolute(),
        trust=trust,
        header=header_settings(affine_from, None, spacing_mm),
    )
    outcome = run_flow(liver_mask, dry_run=dry_run, local=True, request=request, refresh=refresh)
    lines = []
    if folder := outcome.details.pop("folder", None):
        facts = json.loads((Path(folder) / "case.json").read_text(encoding="utf-8"))
        written = copy_result(Path(folder), out, "liver.nii.gz")
        outcome.details.update(written=str(written), **facts)
        sure = f"sureness {facts['sureness']:.2f}"
        lines.append(f"wrote {written}: {facts['method']}, {sure}, {facts['liver_ml']:.0f} mL")
        lines += facts["notes"]
    print_and_exit(outcome, as_json=as_json, lines=lines)
