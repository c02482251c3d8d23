"""`adflows serve`, a Prefect server and a worker on this machine as one command; `server` and `worker`, either alone.

Nothing here imports Prefect before its environment is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.machine.environment import heartbeat_s, product_folder, working_folder
from flows.machine.terminal import print_result
from flows.server.supervise import POLL_S, Child, keep
from flows.server.ui_policy import forbid_other_hosts
from medad.base.errors import ConfigError

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"  # noqa: S104 - in a container, where nothing else would be reached
SERVER_SETTINGS = {
    # the browser asks the host it got the page from, whatever name or tunnel that had
    "PREFECT_UI_API_URL": "/api",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    # a slot of a global limit must not be lost for ever when the server restarts while it is held
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # events after a week, runs with their logs and artifacts after 90 days
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "7d",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(90 * 24 * 3600),
    # a page of another site, open in a browser on this machine, must not work the server
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
}
"""Applied where the environment is silent; deploy/adflows.env has the same, for commands of Prefect's own."""

START_S = 180.0
"""The first start makes the database: 14 s on two idle cores."""
STOP_WORKER_S = 30.0
STOP_SERVER_S = 20.0

_PREFECT = [sys.executable, "-m", "prefect"]


@dataclass(frozen=True)
class Working:
    """A worker on this machine."""

    pool: str
    host: str
    """Name of its queue, and its own."""
    limit: int
    """Runs at a time."""


@dataclass(frozen=True)
class Listening:
    """A server on this machine."""

    port: int
    address: str = LOCAL
    """That it is bound to."""

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        return f"http://{LOCAL if self.address == EVERYWHERE else self.address}:{self.port}"


@dataclass(frozen=True)
class Deploying:
    """What is applied to a server that was just started."""

    notify: str | None
    """TYPE/NAME of a notification block."""


def serve_until_told(listening: Listening, working: Working, deploying: Deploying) -> None:
    """Server and worker until Ctrl-C or SIGTERM, which ends all processes.

    Raises
    ------
    ConfigError
        The port or the database is taken, the server does not start, or it refuses prefect.yaml.
    """
    server, worker = _server(listening), _worker(working)

    def begin() -> None:
        _begin(server, listening)
        _apply(deploying, working)
        worker.start()
        print_result(f"{_said(working)}; Ctrl-C ends both")

    with _only_one():
        _port_is_free(listening)
        os.environ.update(server_environment(listening) | worker_environment(working))
        keep((worker, server), begin)


def listen_until_told(listening: Listening) -> None:
    """A server alone until Ctrl-C or SIGTERM. Raises ConfigError as `serve_until_told`."""
    server = _server(listening)
    with _only_one():
        _port_is_free(listening)
        os.environ.update(server_environment(listening))
        keep((server,), lambda: _begin(server, listening))


def work_until_told(working: Working) -> None:
    """A worker for the server of PREFECT_API_URL until Ctrl-C or SIGTERM, which ends its runs as well."""
    worker = _worker(working)

    def begin() -> None:
        worker.start()
        print_result(f"{_said(working)}; Ctrl-C ends it")

    os.environ.update(worker_environment(working))
    keep((worker,), begin)


def _server(listening: Listening) -> Child:
    where = ["--host", listening.address, "--port", str(listening.port)]
    return Child("server", [*_PREFECT, "server", "start", *where], STOP_SERVER_S)


def _worker(working: Working) -> Child:
    """Prefect's worker for this machine's queue. The pool is made by `adflows deploy`, and only there."""
    pool = ["--type", "process", "--pool", working.pool, "--no-create-pool-if-not-found"]
    queue = ["--work-queue", working.host, "--name", working.host, "--limit", str(working.limit)]
    return Child("worker", [*_PREFECT, "worker", "start", *pool, *queue], STOP_WORKER_S, runs_first=True, nice=True)


def _said(working: Working) -> str:
    return f"worker: runs up to {working.limit} at a time from the queue {working.host} of {working.pool}"


def _begin(server: Child, listening: Listening) -> None:
    server.start()
    _wait_for(server, listening)
    forbid_other_hosts(Path(os.environ["PREFECT_UI_STATIC_DIRECTORY"]))
    print_result(f"server: {listening.url}")


def _home() -> Path:
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


def server_environment(listening: Listening) -> dict[str, str]:
    """What the server and this process's own client need; the user's environment wins but for the address."""
    origins = ",".join(f"http://{name}:{listening.port}" for name in (LOCAL, "localhost"))
    defaults = SERVER_SETTINGS | {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
        # Prefect's own place is in its package, which a service may not write to
        "PREFECT_UI_STATIC_DIRECTORY": str(_home() / "ui"),
    }
    values = {name: os.environ.get(name, value) for name, value in defaults.items()}
    values |= {
        "PREFECT_SERVER_API_HOST": listening.address,
        "PREFECT_SERVER_API_PORT": str(listening.port),
        "PREFECT_API_URL": f"{listening.url}/api",
    }
    if auth := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        values["PREFECT_API_AUTH_STRING"] = auth
    return values


def worker_environment(working: Working) -> dict[str, str]:
    """What the worker needs, whatever `prepare_prefect` set for commands that may embed a server and stay quiet."""
    return {
        "ADFLOWS_HOST": working.host,
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(heartbeat_s()),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
        "PREFECT_CLI_PROMPT": "false",
    }


def _port_is_free(listening: Listening) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listening.address, listening.port))
        except OSError as error:
            where = f"port {listening.port} of {listening.address}"
            raise ConfigError(f"{where} cannot be had ({error.strerror}); give another --port") from error


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Two servers on one database would both run its schedules."""
    home = _home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home / "adflows-serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{home}: cannot be written to ({error.strerror}); set PREFECT_HOME") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{home}: another server of ours uses this database; set PREFECT_HOME") from error
        yield
    finally:
        os.close(descriptor)


def _wait_for(server: Child, listening: Listening) -> None:
    end = time.monotonic() + START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert server.process is not None
    while time.monotonic() < end:
        if (code := server.process.poll()) is not None:
            raise ConfigError(f"the server did not start (exit code {code}); its log is above")
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(f"{listening.url}/api/health", timeout=5):
            return
        time.sleep(POLL_S)
    raise ConfigError(f"the server did not answer within {START_S:.0f} s; its log is above")


def _apply(deploying: Deploying, working: Working) -> None:
    from flows.devices.slots import device_count
    from flows.server.deploy import Site, deploy

    site = Site(product_folder(), working_folder(), working.pool, working.host, device_count(), heartbeat_s())
    for applied in asyncio.run(deploy(site, notify=deploying.notify)):
        print_result(applied.line)
