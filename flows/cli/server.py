"""`adflows deploy` and `adflows serve`: the flows on a Prefect server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer

from flows.cli.options import Json
from flows.machine.environment import heartbeat_s, host_name, prepare_prefect, product_folder, working_folder
from flows.machine.terminal import print_result
from medad.base.errors import ConfigError

POOL = "adflows"
PORT = 4200
RUNS_AT_A_TIME = 4
"""A run takes about half a GB before it does anything; device steps wait for each other anyway."""

Pool = Annotated[str, typer.Option("--pool", help="Work pool, made where there is none of this name.")]
HostName = Annotated[
    str | None,
    typer.Option("--host-name", help="Name of this machine's queue and limit. Default: $ADFLOWS_HOST, or the host's."),
]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Runs at a time on this machine.")]
Notify = Annotated[
    str | None,
    typer.Option("--notify", metavar="TYPE/NAME", help="A notification block that is to tell of failed runs."),
]


def deploy(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[DEPLOYMENT]...", help="Of prefect.yaml. Default: all of them.")
    ] = None,
    pool: Pool = POOL,
    host: HostName = None,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices", min=1, help="Device steps at a time on that machine. Default: this one's GPUs, or 1."
        ),
    ] = None,
    notify: Notify = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Also put schedules, switches and parameters back that the UI changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be made or changed; change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Apply prefect.yaml to the server of PREFECT_API_URL: deployments, this machine's queue, limits, automations."""
    prepare_prefect()
    check_server()
    from flows.devices.slots import device_count
    from flows.server.deploy import Site
    from flows.server.deploy import deploy as apply

    site = Site(product_folder(), working_folder(), pool, host or host_name(), devices or device_count(), heartbeat_s())
    applied = asyncio.run(apply(site, names=names or (), notify=notify, reset=reset, dry_run=dry_run))
    if as_json:
        print_result(json.dumps([asdict(each) for each in applied], indent=1))
        return
    for each in applied:
        print_result(each.line)
    if dry_run:
        print_result("nothing was changed")


def check_server() -> None:
    """Raises ConfigError where no server is named, or where it does not answer."""
    from flows.cli.doctor import check_prefect

    check = check_prefect()
    if check.status == "fail":
        raise ConfigError(f"Prefect: {check.found}; {check.advice}")
    if not check.found.startswith("server at"):
        raise ConfigError("PREFECT_API_URL is not set: name a server, or start one with `adflows serve`")


def serve(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="On 127.0.0.1, for the UI and the API.")] = PORT,
    pool: Pool = POOL,
    host: HostName = None,
    limit: Limit = RUNS_AT_A_TIME,
    notify: Notify = None,
) -> None:
    """Server and worker on this machine until Ctrl-C: applies prefect.yaml, and restarts what dies."""
    prepare_prefect()
    from flows.server.serve import Deploying, Listening, Working, serve_until_told

    serve_until_told(Listening(port), Working(pool, host or host_name(), limit), Deploying(notify))


def server(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="For the UI and the API.")] = PORT,
    bind: Annotated[
        str,
        typer.Option("--bind", metavar="ADDRESS", help="Other than 127.0.0.1 in a container only."),
    ] = "127.0.0.1",
) -> None:
    """A Prefect server alone until Ctrl-C, with the settings that `serve` has; restarts it when it dies."""
    prepare_prefect()
    from flows.server.serve import Listening, listen_until_told

    listen_until_told(Listening(port, bind))


def worker(pool: Pool = POOL, host: HostName = None, limit: Limit = RUNS_AT_A_TIME) -> None:
    """A worker for the server of PREFECT_API_URL until Ctrl-C, on this machine's queue; restarts what dies."""
    prepare_prefect()
    check_server()
    from flows.server.serve import Working, work_until_told

    work_until_told(Working(pool, host or host_name(), limit))
