"""Prefect's temporary server, for commands without PREFECT_API_URL. It ends when its command ends, even if killed.

Prefect starts this server as a process of its own and stops it when Python exits. A command that a signal or a crash of
native code ends does not get so far. The server therefore watches its parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from flows.machine.stopping import stopping

PARENT_VARIABLE = "ADFLOWS_PARENT"
"""Variable of the server's environment: process id of the command."""
POLL_S = 0.2
STOP_S = 1.0
"""Time that the server gets to end after its command has ended or was stopped."""


def use_watching_server() -> None:
    """Make Prefect start its temporary server, if it needs one, as a process that watches this one."""
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return  # importing Prefect's server takes seconds
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    class WatchingServer(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            command = [sys.executable, "-m", "uvicorn", "--factory", f"{__name__}:create_app"]
            options = ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
            own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
            settings = get_current_settings().to_environment_variables(exclude_unset=True)
            return subprocess.Popen(
                [*command, *options], env=os.environ | own | settings | {PARENT_VARIABLE: str(os.getpid())}
            )

        def stop(self) -> None:
            process = self.server_process
            if stopping.is_set() and process is not None:  # Prefect would wait for 5 s
                process.terminate()
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
            super().stop()

    # Prefect keeps its server under the key None, and `SubprocessASGIServer()` returns the one that is there
    if None not in SubprocessASGIServer._instances:
        WatchingServer()


def create_app() -> Any:
    """Return the server's application. Called by uvicorn in the server's process, before anything slow is loaded."""
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()
    from prefect.server.api.server import create_app as prefect_app

    return prefect_app()


def _end_with_parent() -> None:
    """Wait until the command has ended, and end this process too."""
    parent = int(os.environ[PARENT_VARIABLE])
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os.kill(os.getpid(), signal.SIGKILL)
