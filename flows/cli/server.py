"""`adflows deploy`, `serve`, `server` and `worker`: run the flows on a Prefect server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
from dataclasses import asdict
from typing import Annotated

import typer

from flows.cli.options import Json
from flows.machine.environment import heartbeat_s, host_name, product_folder, working_folder
from flows.machine.own_server import prepare_prefect
from flows.machine.terminal import print_result
from medad.base.errors import ConfigError

POOL = "adflows"
PORT = 4200
UMASK = "077"
RUNS_AT_A_TIME = 4
"""Default number of runs at a time. A run needs about 0.5 GB before it starts; device steps wait for each other."""

Pool = Annotated[str, typer.Option("--pool", help="Name of the work pool. It is created if it does not exist.")]
HostName = Annotated[
    str | None,
    typer.Option("--host-name", help="Name of this machine's queue. Default: $ADFLOWS_HOST, or the host name."),
]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Number of runs at a time on this machine.")]
Notify = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="TYPE/NAME",
        help="Prefect notification block that reports failed runs, e.g. slack-webhook/team.",
    ),
]
Umask = Annotated[
    str,
    typer.Option(
        "--umask",
        envvar="ADFLOWS_UMASK",
        metavar="OCTAL",
        help="Permissions that new files do not get. With 077 only this user can read masks and reports, with 027 also"
        " the group.",
    ),
]
EXAMPLES = {
    "secret": "adflows secret",
    "watch": "adflows watch --on radiology",
    "deploy": "adflows deploy liver-nightly --host-name gpu1 --dry-run",
    "serve": "adflows serve --port 4200",
    "server": "adflows server --port 4200",
    "worker": "adflows worker --host-name gpu1 --limit 2",
}
"""Example of each command, for its help."""


def deploy(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DEPLOYMENT", help="Deployments of prefect.yaml to apply, such as liver-nightly. Default: all."
        ),
    ] = None,
    pool: Pool = POOL,
    host: HostName = None,
    notify: Notify = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Reset schedules, switches and parameters that were changed in the UI.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be created or changed. Change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Create the deployments on a Prefect server.

    Applies prefect.yaml to the server at $PREFECT_API_URL: deployments, the work pool, this machine's queue and
    automations. Run it once, and again after each upgrade. Schedules are off until you switch them on in the UI.
    """
    prepare_prefect()
    check_server()
    from flows.server.deploy import Site
    from flows.server.deploy import deploy as apply

    site = Site(product_folder(), working_folder(), pool, host or host_name(), heartbeat_s())
    applied = asyncio.run(apply(site, names=names or (), notify=notify, reset=reset, dry_run=dry_run))
    if as_json:
        print_result(json.dumps([asdict(each) for each in applied], indent=1))
        return
    for each in applied:
        print_result(each.line)
    if dry_run:
        print_result("nothing was changed")


def watch(
    on: Annotated[list[str] | None, typer.Option("--on", metavar="INBOX", help="Watch this inbox.")] = None,
    off: Annotated[list[str] | None, typer.Option("--off", metavar="INBOX", help="Stop watching this inbox.")] = None,
    pool: Pool = POOL,
    as_json: Json = False,
) -> None:
    """Show which inboxes the workers watch, and switch them on and off.

    `adflows deploy` creates a deployment for each configuration of an inbox. While it is switched on, the machine of
    its queue looks for new scans each minute, and makes a run only for these. Prefect's UI has the same switch.
    """
    prepare_prefect()
    check_server()
    from prefect.client.orchestration import get_client

    from flows.server.inboxes import read_watched, switch_inbox

    with get_client(sync_client=True) as client:
        for state, names in ((True, on or []), (False, off or [])):
            for name in names:
                switch_inbox(client, pool, name, on=state)
        found = read_watched(client, pool)
    if as_json:
        rows = [{"inbox": each.config, "watched": each.on, "queue": each.queue} for each in found]
        print_result(json.dumps(rows, indent=1))
        return
    for each in found:
        print_result(f"{'on' if each.on else 'off':<3} {each.config:<24} queue {each.queue}")
    if not found:
        print_result("no inbox has a deployment; run `adflows deploy`")


def check_server() -> None:
    """Raise ConfigError if $PREFECT_API_URL is not set, or if the server does not answer or refuses the secret."""
    from flows.cli.doctor import check_prefect

    check = check_prefect()
    if check.status == "fail":
        raise ConfigError(f"Prefect: {check.found}; {check.advice}")
    if not check.found.startswith("server at"):
        raise ConfigError("PREFECT_API_URL is not set; set it to a server's address, or start one with `adflows serve`")
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except PrefectHTTPStatusError as error:
        code = error.response.status_code
        advice = "set PREFECT_API_AUTH_STRING to its secret" if code in {401, 403} else "is it a Prefect server?"
        raise ConfigError(f"Prefect: {check.found} refuses this client ({code}); {advice}") from error


def secret(
    export: Annotated[
        bool,
        typer.Option("--export", help='Print the variables for other programs: eval "$(adflows secret --export)".'),
    ] = False,
) -> None:
    """Show the secret of this user's server.

    The UI asks for it. Whoever has it can run programs as the server's user, so give it only to those who may. Commands
    of this user read it by themselves. Delete the file and restart the server to get another one.
    """
    from flows.machine.own_server import CLIENT_VARIABLE, read_secret, running_server, secret_file

    found = read_secret()
    if found is None:
        raise ConfigError(f"{secret_file()}: no secret yet; `adflows serve` creates it")
    if not export:
        print_result(found)
        return
    if (running := running_server()) is not None:
        print_result(f"export PREFECT_API_URL={shlex.quote(running[0])}")
    print_result(f"export {CLIENT_VARIABLE}={shlex.quote(found)}")


def set_umask(text: str) -> None:
    """Set the permissions that new files of this process and its children do not get. Raises ConfigError."""
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ConfigError(f"--umask {text}: expected three octal digits, such as 077")
    os.umask(int(text, 8))


def serve(
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port of the UI and the API on 127.0.0.1.")
    ] = PORT,
    pool: Pool = POOL,
    host: HostName = None,
    limit: Limit = RUNS_AT_A_TIME,
    notify: Notify = None,
    umask: Umask = UMASK,
) -> None:
    """Run a Prefect server and a worker.

    Starts both on this machine, applies prefect.yaml, and runs until Ctrl-C. A server or worker that dies is started
    again. The UI is at http://127.0.0.1:PORT. It asks for the secret that `adflows secret` shows.
    """
    set_umask(umask)
    prepare_prefect()
    from flows.server.serve import DeployOptions, ServerOptions, WorkerOptions, serve_until_stopped

    serve_until_stopped(ServerOptions(port), WorkerOptions(pool, host or host_name(), limit), DeployOptions(notify))


def server(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the UI and the API.")] = PORT,
    bind: Annotated[
        str,
        typer.Option("--bind", metavar="ADDRESS", help="Address to listen on: 127.0.0.1, or 0.0.0.0 in a container."),
    ] = "127.0.0.1",
    umask: Umask = UMASK,
) -> None:
    """Run a Prefect server without a worker.

    Runs until Ctrl-C, with the same settings as `adflows serve`. A server that dies is started again.
    """
    set_umask(umask)
    prepare_prefect()
    from flows.server.serve import ServerOptions, run_server_until_stopped

    run_server_until_stopped(ServerOptions(port, bind))


def worker(
    pool: Pool = POOL,
    host: HostName = None,
    limit: Limit = RUNS_AT_A_TIME,
    umask: Umask = UMASK,
    check: Annotated[
        bool, typer.Option("--check", help="Only check the server and the cache, for workers of Dask and Ray.")
    ] = False,
) -> None:
    """Run a worker for a Prefect server.

    Runs the flows that the server at $PREFECT_API_URL puts into this machine's queue, until Ctrl-C. A worker that dies
    is started again. It does not start without the server, its secret, or a cache with working locks.
    """
    set_umask(umask)
    prepare_prefect()
    check_server()
    check_cache_use()
    if check:
        print_result("this machine can work: server and cache are usable")
        return
    from flows.server.serve import WorkerOptions, run_worker_until_stopped

    run_worker_until_stopped(WorkerOptions(pool, host or host_name(), limit))


def check_cache_use() -> None:
    """Raise ConfigError unless files of the cache can be written and locked here."""
    from flows.cli.doctor import check_cache
    from flows.store.access import require_cache

    require_cache()
    check = check_cache()
    if check.status == "fail":
        raise ConfigError(f"cache: {check.found}; {check.advice}")
