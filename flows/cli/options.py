"""Parts that all commands share: options, settings from --set, running a flow and printing its result.

This module imports nothing heavy: `--help` must not wait for torch or Prefect.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.machine.environment import config_names
from flows.machine.own_server import prepare_prefect
from flows.machine.stage import format_seconds
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flows.runs.flow import RunnableFlow
    from flows.runs.outcome import Outcome

SET_HELP = "Override a setting, e.g. gpus=cpu. KEY is its dotted key, VALUE is YAML. Repeatable."

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)]
Name = Annotated[str | None, typer.Option(help="Name of the run and of its folder. Default: the configuration's name.")]
Runs = Annotated[
    Path,
    typer.Option("--out", "-o", help="Folder of all runs. The text above says which folder below it this run writes."),
]
Refresh = Annotated[bool, typer.Option("--refresh", help="Compute every step again, even if its result is cached.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List what is cached and what would be computed, and why. Write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print only failures, and the result as JSON on standard output.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, show_default=False, help="Show each task. -vv also shows Prefect's log."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only failures and the result.")]

EXIT_USER_ERROR = 2
"""Exit code for bad input, a bad configuration or a failed case."""
LOCAL_VARIABLE = "ADFLOWS_LOCAL"
"""Environment variable that runs flows without Prefect when it is 1."""


def example(*commands: str) -> str:
    """Return the end of a command's help: its examples, printed as they are written."""
    return "\n  ".join([f"\b\nExample{'s' * (len(commands) > 1)}:", *commands])


def complete_config(flow: str) -> Callable[[str], list[str]]:
    """Return the function that completes names of a flow's configurations. The shell completes file names itself."""
    return lambda incomplete: [name for name in config_names(flow) if name.startswith(incomplete)]


def prepare_terminal(*, verbose: int = 0, quiet: bool = False, as_json: bool = False) -> None:
    """Turn the terminal on. Raise ConfigError for options that exclude each other."""
    if verbose and (quiet or as_json):
        raise ConfigError(f"--verbose and {'--quiet' if quiet else '--json'} exclude each other")
    terminal.enabled = True
    terminal.verbosity = "quiet" if quiet or as_json else ("normal", "verbose", "log")[min(verbose, 2)]


def prepare_command(*, verbose: int, quiet: bool, as_json: bool) -> None:
    """Turn the terminal on. Set the environment that Prefect reads when it is imported."""
    prepare_terminal(verbose=verbose, quiet=quiet, as_json=as_json)
    prepare_prefect(verbose=verbose > 1)


def run_flow(flow: RunnableFlow[...], *, dry_run: bool = False, local: bool = False, **parameters: Any) -> Outcome:
    """Run a flow under Prefect, or only plan it. Raise the error that made the flow as a whole fail.

    With `local`, or with $ADFLOWS_LOCAL=1, it runs in this process: no server, and no record in Prefect's UI.
    """
    if dry_run:
        return flow.plan(**parameters)
    began = time.monotonic()
    with terminal.run():
        local = local or os.environ.get(LOCAL_VARIABLE) == "1"
        outcome = flow.local(**parameters) if local else _run_under_prefect(flow, **parameters)
    return replace(outcome, seconds=round(time.monotonic() - began, 1))


def _run_under_prefect(flow: RunnableFlow[...], **parameters: Any) -> Outcome:
    from flows.cli.doctor import check_prefect

    server = check_prefect()
    if server.status == "fail":
        raise ConfigError(f"Prefect: {server.found}; {server.advice}")
    return flow.run(**parameters)


def outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    """Return what --json prints. It contains no path of an input, because it may be stored or mailed."""
    from flows.runs.headline import read_notices

    return {
        "run_folder": None if outcome.run_folder is None else str(outcome.run_folder.absolute()),
        "computed": outcome.computed,
        "cached": outcome.cached,
        "seconds": outcome.seconds,
        "failures": [{"case": f.case_id, "stage": f.stage, "rule": f.rule} for f in outcome.failures],
        "headline": {key: figure.value for key, figure in outcome.headline.items()},
        "notices": [] if outcome.run_folder is None else read_notices(outcome.run_folder),
        **{name: value for name, value in outcome.details.items() if name != "lines"},
    }


def print_and_exit(outcome: Outcome, *, as_json: bool, lines: Sequence[str] = ()) -> None:
    """Print the result. Exit with code 2 if a case failed; raise the first bug."""
    if as_json:
        print_result(json.dumps(outcome_as_json(outcome), indent=1))
    else:
        print_outcome(outcome, lines=lines)
    exit_by_outcome(outcome)


def exit_by_outcome(*outcomes: Outcome) -> None:
    """Raise the first bug. Exit with code 2 if a case failed."""
    for outcome in outcomes:
        if outcome.bug is not None:
            raise outcome.bug
    if any(outcome.failures for outcome in outcomes):
        raise typer.Exit(EXIT_USER_ERROR)


def print_outcome(outcome: Outcome, *, lines: Sequence[str] = (), title: str = "") -> None:
    """Print the headline figures, the paths of the results, the number of tasks and the time."""
    from flows.runs.headline import read_notices_text

    plan = outcome.details.get("plan")
    for line in [title] * bool(title) + (list(lines) if plan is None else outcome.details["lines"]):
        print_result(line)
    if plan is not None:
        count = {status: sum(row["status"] == status for row in plan) for status in ("cached", "make", "follows")}
        print_result(
            f"{count['cached']} cached, {count['make']} to make, {count['follows']} depend on these; nothing written"
        )
        return
    for figure in outcome.headline.values():
        shown = "undefined" if figure.value is None else format(figure.value, ".3f")
        print_result(f"{figure.title:<32} {shown}")
    if outcome.run_folder is not None and (statement := read_notices_text(outcome.run_folder)):
        print_result(statement)
    reported = outcome.run_folder is not None and (outcome.run_folder / "report.html").is_file()
    if outcome.run_folder is not None:
        folder = outcome.run_folder.absolute()
        print_result(f"report: {folder / 'report.html'}" if reported else f"results: {folder}")
    total = outcome.computed + outcome.cached
    counts = f"{total} task{'' if total == 1 else 's'}: {outcome.computed} computed, {outcome.cached} cached"
    print_result(f"{counts}, in {format_seconds(outcome.seconds)}")
    if outcome.failures:
        cases = len({failure.case_id for failure in outcome.failures})
        print_result(f"{cases} failed" + ("; the report lists them with the reasons" if reported else ""))


def parse_overrides(pairs: list[str] | None, **options: Any) -> dict[str, Any]:
    """Return settings by dotted key, from KEY=VALUE pairs and from options. Raise ConfigError for a bad pair.

    Values are YAML. An option's name is its key with `__` for each dot; None means that it was not given.
    """
    import yaml

    overrides: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair}: expected KEY=VALUE, for example gpus=cpu")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {pair}: the value is not valid YAML") from error
    overrides |= {key.replace("__", "."): value for key, value in options.items() if value is not None}
    return overrides
