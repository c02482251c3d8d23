"""The commands `adflows serve`, `server` and `worker`.

`serve` runs a Prefect server and a worker on this machine. `server` and `worker` run only one of them. Beside each
worker runs a watcher of this machine's inboxes (`flows.server.inbox_watch`).

This module does not import Prefect before Prefect's environment variables are set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.machine.environment import heartbeat_s, prefect_home, product_folder, runs_root, working_folder
from flows.machine.own_server import CLIENT_VARIABLE, SERVER_VARIABLE, ensure_secret, only_server, secret_file
from flows.machine.terminal import print_result
from flows.runs.ui_artifacts import REPORTS
from flows.server.supervise import POLL_S, Child, run_until_stopped
from flows.server.ui_policy import change_pages
from medad.base.errors import ConfigError

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"  # noqa: S104 - needed in a container
SERVER_SETTINGS = {
    # the browser contacts the host that the page came from, so that other host names and tunnels work
    "PREFECT_UI_API_URL": "/api",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    # a slot of a global limit that is in use must be freed even if the server restarts
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # delete events after a week, and runs with their logs and artifacts after 90 days
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "7d",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(90 * 24 * 3600),
    # a page of another site that is open in a browser here must not be able to control the server
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
}
"""Defaults for variables that the environment does not set. deploy/adflows.env has them for Prefect's commands."""

START_S = 180.0
"""Time limit for the start. The first start creates the database, which takes 14 s on two idle cores."""
STOP_WORKER_S = 30.0
STOP_SERVER_S = 20.0
STOP_WATCHER_S = 5.0

_PREFECT = [sys.executable, "-m", "prefect"]


@dataclass(frozen=True)
class WorkerOptions:
    """Options of a worker on this machine."""

    pool: str
    host: str
    """Name of the worker and of its queue."""
    limit: int
    """Number of runs at a time."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server on this machine."""

    port: int
    address: str = LOCAL
    """Address that the server listens on."""

    @property
    def url(self) -> str:
        """URL of the server on this machine."""
        return f"http://{LOCAL if self.address == EVERYWHERE else self.address}:{self.port}"


@dataclass(frozen=True)
class DeployOptions:
    """Options of the deployment to a server that was just started."""

    notify: str | None
    """TYPE/NAME of a notification block. None: no notifications."""


def serve_until_stopped(
    server_options: ServerOptions, worker_options: WorkerOptions, deploy_options: DeployOptions
) -> None:
    """Run a server and a worker until Ctrl-C or SIGTERM, which ends all processes.

    Raises
    ------
    ConfigError
        The port or the database is in use, the server does not start, or it rejects prefect.yaml.
    """
    server, (watcher, worker) = _server(), _worker(worker_options)

    def begin() -> None:
        _start_server(server, server_options)
        _apply(deploy_options, worker_options)
        _start_worker(watcher, worker, worker_options)
        print_result(f"{_worker_line(worker_options)}; Ctrl-C ends all")

    with _only_server(server_options):
        os.environ.update(worker_environment(worker_options))
        run_until_stopped((watcher, worker, server), begin)


def run_server_until_stopped(server_options: ServerOptions) -> None:
    """Run only a server until Ctrl-C or SIGTERM. Raises ConfigError as `serve_until_stopped` does."""
    server = _server()
    with _only_server(server_options):
        run_until_stopped((server,), lambda: _start_server(server, server_options))


def run_worker_until_stopped(worker_options: WorkerOptions) -> None:
    """Run a worker for the server of PREFECT_API_URL until Ctrl-C or SIGTERM, which also ends the worker's runs."""
    watcher, worker = _worker(worker_options)

    def begin() -> None:
        _start_worker(watcher, worker, worker_options)
        print_result(f"{_worker_line(worker_options)}; Ctrl-C ends it")

    os.environ.update(worker_environment(worker_options))
    run_until_stopped((watcher, worker), begin)


@contextlib.contextmanager
def _only_server(server_options: ServerOptions) -> Iterator[None]:
    """Hold the lock of the database, and set the environment of the server and its clients."""
    api = f"{server_options.url}/api"
    with only_server(api, own_secret=not os.environ.get(SERVER_VARIABLE)):
        _check_port(server_options)
        os.environ.update(server_environment(server_options))
        _use_secret()
        yield


def _use_secret() -> None:
    """Set the server's secret for it and its clients: the user's own, or that of the file, which is made if missing."""
    if own := os.environ.get(SERVER_VARIABLE):
        os.environ[CLIENT_VARIABLE] = own
        return
    secret, new = ensure_secret()
    os.environ |= {SERVER_VARIABLE: secret, CLIENT_VARIABLE: secret}
    # a service's output goes to a log that others can read
    if new and sys.stdout.isatty():
        print_result(f"new secret to log in to the UI and the API: {secret}")
    print_result(f"secret: in {secret_file()}; `adflows secret` shows it")


def _server() -> Child:
    return Child("server", [sys.executable, "-m", "flows.server.app"], STOP_SERVER_S)


def _worker(worker_options: WorkerOptions) -> tuple[Child, Child]:
    """Return the watcher of this machine's inboxes, and Prefect's worker for its queue.

    Only `adflows deploy` creates the work pool.
    """
    watch = ["-m", "flows.server.inbox_watch", worker_options.pool, worker_options.host]
    pool = ["--type", "process", "--pool", worker_options.pool, "--no-create-pool-if-not-found"]
    queue = ["--work-queue", worker_options.host, "--name", worker_options.host, "--limit", str(worker_options.limit)]
    worker = Child("worker", [*_PREFECT, "worker", "start", *pool, *queue], STOP_WORKER_S, runs_first=True, nice=True)
    return Child("inbox watcher", [sys.executable, *watch], STOP_WATCHER_S, nice=True), worker


def _start_worker(watcher: Child, worker: Child, worker_options: WorkerOptions) -> None:
    _end_dead_runs(worker_options)
    worker.start()
    watcher.start()


def _worker_line(worker_options: WorkerOptions) -> str:
    pool, queue = worker_options.pool, worker_options.host
    return f"worker: up to {worker_options.limit} runs at a time, from queue {queue} of work pool {pool}"


def _start_server(server: Child, server_options: ServerOptions) -> None:
    server.start()
    _wait_for(server, server_options)
    change_pages(Path(os.environ["PREFECT_UI_STATIC_DIRECTORY"]))
    print_result(f"server: {server_options.url}, reports: {server_options.url}{REPORTS}/")


def server_environment(server_options: ServerOptions) -> dict[str, str]:
    """Return the variables for the server and for this process's client.

    Values of the user's environment are used first, except for the address.
    """
    origins = ",".join(f"http://{name}:{server_options.port}" for name in (LOCAL, "localhost"))
    defaults = SERVER_SETTINGS | {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
        # by default the UI lies in Prefect's package, where a service must not write
        "PREFECT_UI_STATIC_DIRECTORY": str(prefect_home() / "ui"),
    }
    values = {name: os.environ.get(name, value) for name, value in defaults.items()}
    values |= {
        # the server shows the reports of the folder that deployed flows write to
        "ADFLOWS_RUNS": str(runs_root() if os.environ.get("ADFLOWS_RUNS") else working_folder() / "runs"),
        "PREFECT_SERVER_API_HOST": server_options.address,
        "PREFECT_SERVER_API_PORT": str(server_options.port),
        "PREFECT_API_URL": f"{server_options.url}/api",
    }
    return values


def worker_environment(worker_options: WorkerOptions) -> dict[str, str]:
    """Return the variables for the worker and its runs.

    They replace those of `prepare_prefect`, which are for commands that may embed a server and print little.
    """
    temporary = prefect_home() / "tmp"
    temporary.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        "ADFLOWS_HOST": worker_options.host,
        # the work pool's command finds this Python
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        # Prefect's worker uses a fixed name in this folder, which on /tmp belongs to the first user
        "TMPDIR": str(temporary),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(heartbeat_s()),
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "DO_NOT_TRACK": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
        "PREFECT_CLI_PROMPT": "false",
    }


def _check_port(server_options: ServerOptions) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server_options.address, server_options.port))
        except OSError as error:
            where = f"port {server_options.port} of {server_options.address}"
            raise ConfigError(f"{where} is not available ({error.strerror}); give another --port") from error


def _wait_for(server: Child, server_options: ServerOptions) -> None:
    end = time.monotonic() + START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert server.process is not None
    while time.monotonic() < end:
        if (code := server.process.poll()) is not None:
            raise ConfigError(f"the server did not start (exit code {code}); its log is above")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            opener.open(f"{server_options.url}/api/health", timeout=5),
        ):
            return
        time.sleep(POLL_S)
    raise ConfigError(f"the server did not answer within {START_S:.0f} s; its log is above")


def _apply(deploy_options: DeployOptions, worker_options: WorkerOptions) -> None:
    from flows.server.deploy import Site, deploy

    site = Site(product_folder(), working_folder(), worker_options.pool, worker_options.host, heartbeat_s())
    for applied in asyncio.run(deploy(site, notify=deploy_options.notify)):
        print_result(applied.line)


def _end_dead_runs(worker_options: WorkerOptions) -> None:
    """Mark the runs of this machine whose processes are gone as crashed, as after a power cut."""
    from flows.server.watch import end_dead_runs

    for name in end_dead_runs(worker_options.pool, worker_options.host):
        print_result(f"run {name}: its process is gone, so it is marked as crashed")
