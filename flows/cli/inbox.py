"""`adflows liver inbox`: segment new scans of a folder once or repeatedly, and list the state of each scan."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import (
    EXIT_USER_ERROR,
    DryRun,
    Json,
    Quiet,
    Refresh,
    Set,
    Verbose,
    complete_config,
    outcome_as_json,
    parse_overrides,
    prepare_command,
    print_and_exit,
    print_outcome,
    run_flow,
)
from flows.machine.stopping import StoppedError
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError, UserError

if TYPE_CHECKING:
    from flows.inbox.config import Inbox, InboxRequest


def inbox(
    config: Annotated[
        Path,
        typer.Argument(
            help="Inbox: a YAML file, or the name of one in configs/inbox.", autocompletion=complete_config("inbox")
        ),
    ],
    cases: Annotated[
        list[str] | None, typer.Argument(help="With --retry: cases to segment again. Default: all that failed.")
    ] = None,
    overrides: Set = None,
    list_cases: Annotated[
        bool, typer.Option("--list", help="List the scans in the inbox and their state. Segment nothing.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Segment failed cases again, or the cases given, in any state.")
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch", metavar="SECONDS", min=1, help="Look for new scans at this interval in seconds, until Ctrl-C."
        ),
    ] = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Segment new scans in an inbox folder.

    The inbox's file names the folder and the output folder. It may also name liver masks and a trained model;
    otherwise each liver is found and the model in the package is used. Each scan is segmented once: it is known by its
    content, not by its name.

    Writes one folder per case, inbox.csv, and failed/ with the reason of each failure.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    if cases and not retry:
        raise ConfigError(f"{cases[0]}: cases can be given only with --retry")
    if sum((list_cases, dry_run, watch is not None)) > 1:
        raise ConfigError("--list, --dry-run and --watch exclude each other")
    from flows.inbox.config import ALL_FAILED, Inbox, InboxRequest
    from flows.inbox.flow import liver_inbox

    asked = tuple(cases or [ALL_FAILED]) if retry else ()
    request = InboxRequest(config=str(config), retry=asked, overrides=parse_overrides(overrides))
    opened = Inbox.open(request)  # report configuration errors before Prefect starts
    if list_cases:
        _list(opened, as_json=as_json)
    elif watch is not None:
        _watch(request, watch, refresh=refresh, as_json=as_json)
    else:
        outcome = run_flow(liver_inbox, request=request, refresh=refresh, dry_run=dry_run)
        print_and_exit(outcome, as_json=as_json, lines=outcome.details["lines"])


def _watch(request: InboxRequest, seconds: float, *, refresh: bool, as_json: bool) -> None:
    """Look into the inbox at an interval until interrupted. The flow runs only if there is something to do."""
    from flows.inbox.config import has_news
    from flows.inbox.flow import liver_inbox

    failed, bug = False, None
    with contextlib.suppress(KeyboardInterrupt, StoppedError):
        while True:
            try:
                if has_news(request):
                    outcome = run_flow(liver_inbox, request=request, refresh=refresh)
                    if as_json:
                        print_result(json.dumps(outcome_as_json(outcome)))
                    else:
                        print_outcome(outcome, lines=outcome.details["lines"])
                    failed, bug = failed or bool(outcome.failures), bug or outcome.bug
            except UserError as error:  # a network share may be unavailable for a while
                failed = True
                terminal.failure(str(error))
            request = request.model_copy(update={"retry": ()})
            time.sleep(seconds)
    if bug is not None:
        raise bug
    if failed:
        raise typer.Exit(EXIT_USER_ERROR)


def _list(opened: Inbox, *, as_json: bool) -> None:
    """Print each scan in the inbox and its state. The terminal is the user's own, so paths may be shown."""
    from flows.inbox.config import list_scans

    found = list_scans(opened)
    if as_json:
        print_result(json.dumps({"out": str(opened.folder.path), "scans": found}, indent=1))
        return
    for each in found:
        rule = f": {each['rule']}" if each["rule"] else ""
        print_result(f"{each['status']:<8} {each['case'] or '-':<20} {each['scan']}{rule}")
    count = {status: sum(each["status"] == status for each in found) for status in ("done", "failed", "new", "waiting")}
    print_result(", ".join(f"{number} {status}" for status, number in count.items()))
