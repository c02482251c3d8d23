"""`adflows liver view`: the whole scan of a segmented case in a page, with its overlays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Quiet, Verbose, prepare_terminal
from flows.machine.terminal import print_result
from flows.privacy import case_ids
from medad.base.errors import ConfigError, UserError

INSERTED = "inserted"


def view(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    case: Annotated[str | None, typer.Argument(help="Case, as in the report. Default: the run's only one.")] = None,
    scan: Annotated[
        Path | None, typer.Option("--scan", help="Scan of the case. Default: by its id, see `adflows ids`.")
    ] = None,
    label: Annotated[
        Path | None, typer.Option("--label", help="Mask of liver, and of tumour with --tumour-label.")
    ] = None,
    liver_label: Annotated[list[int] | None, typer.Option("--liver-label", help="Value of liver in the mask.")] = None,
    tumour_label: Annotated[
        int | None, typer.Option("--tumour-label", help="Value of tumour in the mask: the ground truth.")
    ] = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write a page to scroll through the whole scan of a case.

    Writes RUN/cases/CASE.html: three planes, windows, overlays of liver, lesions and probability, and the table of
    lesions. It is one file that needs no network. The page contains the scan, so it is patient data.
    """
    prepare_terminal(verbose=verbose, quiet=quiet)
    name = case or _only_case(run)
    if tumour_label is not None and label is None:
        raise ConfigError("--tumour-label needs the mask: --label")
    from medad.cohort.datasets import LabelledScan
    from medad.reports.viewer.page import SegmentedFiles, write_case_page

    files = SegmentedFiles.of_run(run, name)
    inserted = run / INSERTED / name
    if scan is not None or label is not None:
        path = scan or _registered(name).scan
        labels = tuple(sorted({*(liver_label or ()), *(() if tumour_label is None else (tumour_label,))}))
        found = LabelledScan(path, label, labels, tumour_label, fill_cavities=True)
    elif inserted.is_dir():
        found = LabelledScan.inserted(inserted)
    else:
        registered = _registered(name)
        automatic = run / "liver_masks" / f"{name}.nii.gz"
        mask, values = (automatic, (1,)) if automatic.is_file() else (registered.liver, registered.liver_labels)
        found = LabelledScan(registered.scan, mask, values, None, fill_cavities=True)
    page = run / "cases" / f"{name}.html"
    write_case_page(found, name, files, page, back="../report.html")
    print_result(str(page.absolute()))


def _only_case(run: Path) -> str:
    names = sorted(file.name.removesuffix(".nii.gz") for file in (run / "masks").glob("*.nii.gz"))
    if len(names) == 1:
        return names[0]
    if not names:
        raise ConfigError(f"{run}: not a run folder with segmented cases: it has no masks/*.nii.gz")
    raise ConfigError(
        f"{run}: it has {len(names)} cases; name one of {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
    )


def _registered(name: str) -> case_ids.RegisteredCase:
    try:
        return case_ids.look_up(name)
    except UserError:
        raise ConfigError(f"{name}: this machine does not know its scan; give it with --scan") from None
