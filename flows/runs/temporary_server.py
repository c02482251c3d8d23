"""The temporary Prefect server of a command without PREFECT_API_URL. It ends when its command ends, even if killed.

Prefect could start one too. For that it loads its whole server into the command's process, which takes seconds, and
lets every user of this machine use the API. This one has a random secret, and a socket that no other program can take.
"""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from flows.machine.environment import collect_rarely
from flows.machine.own_server import CLIENT_VARIABLE, SERVER_VARIABLE
from flows.machine.stopping import StoppedError, stopping
from flows.machine.terminal import terminal
from medad.base.errors import ConfigError

PARENT_VARIABLE = "ADFLOWS_PARENT"
"""Variable of the server's environment: process id of the command."""
POLL_S = 0.2
STOP_S = 1.0
"""Time that the server gets to end after its command has ended or was stopped."""

_url: str | None = None
_process: subprocess.Popen[bytes] | None = None


def temporary_url() -> str | None:
    """Return the address of the API of this process's temporary server. None: it has none."""
    return _url


def use_temporary_server() -> None:
    """Start the temporary server and let Prefect use it, unless PREFECT_API_URL names a server.

    Raises
    ------
    ConfigError
        It ended at once, or did not answer in time.
    StoppedError
        The command was interrupted meanwhile.
    """
    global _url, _process  # noqa: PLW0603 - one per process
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

    if PREFECT_API_URL.value():
        return
    secret = f"adflows:{secrets.token_urlsafe(24)}"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        _process = _start(listening, secret)
    atexit.register(_stop)
    _wait_until_it_answers(_process, url, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    _url = url
    os.environ |= {"PREFECT_API_URL": url, CLIENT_VARIABLE: secret}
    refresh_global_settings_context()


def _start(listening: socket.socket, secret: str) -> subprocess.Popen[bytes]:
    from prefect.settings import get_current_settings

    number = listening.fileno()
    own = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        PARENT_VARIABLE: str(os.getpid()),
        SERVER_VARIABLE: secret,
        CLIENT_VARIABLE: secret,
    }
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(number)], pass_fds=(number,), env=os.environ | settings | own
    )


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, limit_s: int) -> None:
    end = time.monotonic() + limit_s
    with terminal.waiting("waiting for Prefect's temporary server"):
        while not _answers(url):
            if process.poll() is not None:
                raise ConfigError(f"Prefect: its temporary server ended with exit code {process.returncode}")
            if time.monotonic() > end:
                raise ConfigError(
                    f"Prefect: its temporary server did not answer in {limit_s} s; try again when the machine is less "
                    "busy, raise PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, or start a server with "
                    "`adflows serve`"
                )
            if stopping.is_set():
                raise StoppedError


def _answers(url: str) -> bool:
    """Return whether the server answers within a poll. Its socket already takes requests while it starts."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=POLL_S):  # noqa: S310 - our own server
            return True
    except urllib.error.HTTPError:  # it asks for the secret
        return True
    except OSError:
        return False


def _stop() -> None:
    """End the server. If the command was stopped, it gets less time."""
    if _process is None:
        return
    _process.terminate()
    try:
        _process.wait(STOP_S if stopping.is_set() else 5 * STOP_S)
    except subprocess.TimeoutExpired:
        _process.kill()
        _process.wait()


def _serve(descriptor: int) -> None:
    """Serve on a listening socket, in the server's own process."""
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()
    collect_rarely()
    import uvicorn
    from prefect.server.api.server import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(), log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=descriptor)])


def _end_with_parent() -> None:
    """Wait until the command has ended, and end this process too."""
    parent = int(os.environ[PARENT_VARIABLE])
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
