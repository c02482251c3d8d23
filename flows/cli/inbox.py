"""`adflows liver inbox`: one pass over an inbox, by hand or again and again, and a list of what is done."""

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
    Refresh,
    Set,
    Verbose,
    outcome_as_json,
    parse_overrides,
    prepare_command,
    print_and_exit,
    print_outcome,
    run_flow,
)
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError, UserError

if TYPE_CHECKING:
    from flows.inbox.config import Inbox, InboxRequest


def inbox(
    config: Annotated[Path, typer.Argument(help="A YAML file, or a name in configs/inbox.")],
    cases: Annotated[
        list[str] | None, typer.Argument(help="With --retry: cases to try again; none: all failed.")
    ] = None,
    overrides: Set = None,
    list_cases: Annotated[
        bool, typer.Option("--list", help="Say of each scan in the inbox what became of it; segment nothing.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try cases again that failed, or those named, done or failed.")
    ] = False,
    watch: Annotated[
        float | None, typer.Option("--watch", metavar="SECONDS", min=1, help="Look again so often, until Ctrl-C.")
    ] = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Segment what is new in an inbox folder: each scan once, whatever it is called and however often this runs."""
    prepare_command(verbose=verbose)
    if cases and not retry:
        raise ConfigError(f"{cases[0]}: cases are named with --retry only")
    if sum((list_cases, dry_run, watch is not None)) > 1:
        raise ConfigError("--list, --dry-run and --watch exclude each other")
    from flows.inbox.config import ALL_FAILED, Inbox, InboxRequest
    from flows.inbox.flow import liver_inbox

    asked = tuple(cases or [ALL_FAILED]) if retry else ()
    request = InboxRequest(config=str(config), retry=asked, overrides=parse_overrides(overrides))
    opened = Inbox.open(request)  # what is wrong with it is said before Prefect starts
    if list_cases:
        _list(opened, as_json=as_json)
    elif watch is not None:
        _watch(request, watch, refresh=refresh, as_json=as_json)
    else:
        outcome = run_flow(liver_inbox, request=request, refresh=refresh, dry_run=dry_run)
        print_and_exit(outcome, as_json=as_json, lines=outcome.details["lines"])


def _watch(request: InboxRequest, seconds: float, *, refresh: bool, as_json: bool) -> None:
    """Passes, until interrupted; the flow runs only where there is something to do."""
    from flows.inbox.config import has_news
    from flows.inbox.flow import liver_inbox

    failed, bug = False, None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                if has_news(request):
                    outcome = run_flow(liver_inbox, request=request, refresh=refresh)
                    if as_json:
                        print_result(json.dumps(outcome_as_json(outcome)))
                    else:
                        print_outcome(outcome, lines=outcome.details["lines"])
                    failed, bug = failed or bool(outcome.failures), bug or outcome.bug
            except UserError as error:  # a share that is away for a while
                failed = True
                terminal.line(str(error))
            request = request.model_copy(update={"retry": ()})
            time.sleep(seconds)
    if bug is not None:
        raise bug
    if failed:
        raise typer.Exit(EXIT_USER_ERROR)


def _list(opened: Inbox, *, as_json: bool) -> None:
    """Each scan in the inbox, and what became of it: on the user's own terminal, hence with its path."""
    from flows.inbox.config import listing

    found = listing(opened)
    if as_json:
        print_result(json.dumps({"out": str(opened.folder.path), "scans": found}, indent=1))
        return
    for each in found:
        rule = f": {each['rule']}" if each["rule"] else ""
        print_result(f"{each['status']:<8} {each['case'] or '-':<20} {each['scan']}{rule}")
    count = {status: sum(each["status"] == status for each in found) for status in ("done", "failed", "new", "waiting")}
    print_result(", ".join(f"{number} {status}" for status, number in count.items()))
