"""The program of a run that a worker starts: it loads only flows of known deployments, and outlives its worker.

A run's command is part of the work pool, so whoever creates a run cannot replace it. The entry point of the flow comes
from the administrator's files, not from the server. A deployment's pull steps are not run.

    python -m flows.server.run
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import yaml

from flows.machine.environment import collect_rarely, product_folder
from flows.machine.terminal import terminal

FILES_VARIABLE = "ADFLOWS_DEPLOYMENTS"
"""Further files in the form of prefect.yaml, separated by colons. Workers run their deployments too."""
BY_HAND = "segment-inbox"
"""Deployment of all inboxes, for runs by hand."""
_INBOX_PREFIX = "inbox-"
_BLOCK = 1 << 16
_FLUSH_S = 5.0


def inbox_deployment(config: str) -> str:
    """Return the name of an inbox's own deployment."""
    return _INBOX_PREFIX + config


def entrypoint_of(deployment: str) -> str | None:
    """Return the entry point of a deployment. Those of inboxes run the same flow. None: it is unknown."""
    return known_entrypoints().get(BY_HAND if deployment.startswith(_INBOX_PREFIX) else deployment)


def known_entrypoints() -> dict[str, str]:
    """Return the entry point of each deployment that a worker of this machine runs, by name."""
    more = os.environ.get(FILES_VARIABLE, "").split(os.pathsep)
    files = [product_folder() / "prefect.yaml"]
    for name in filter(None, more):
        if (file := Path(name)).is_file():
            files.append(file)
        else:
            terminal.line(f"{file}: no such file, named in ${FILES_VARIABLE}")
    tables = [yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"] for file in files]
    return {entry["name"]: entry["entrypoint"] for table in tables for entry in table}


def relay_output() -> Callable[[], None]:
    """Let the output of this process and its children go through a pipe of its own. Return a function that flushes it.

    The worker reads the original output. If it is killed, a write there would end the run.
    """
    outer = os.dup(1)
    reader, writer = os.pipe()
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    os.close(writer)

    def copy() -> None:
        gone = False
        while block := os.read(reader, _BLOCK):
            while block and not gone:
                try:
                    block = block[os.write(outer, block) :]
                except OSError:
                    gone = True

    thread = threading.Thread(target=copy, name="output", daemon=True)
    thread.start()

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            os.dup2(outer, descriptor)
        # a child that still has the pipe keeps it open
        thread.join(_FLUSH_S)

    return flush


def main() -> None:
    """Run the flow run $PREFECT__FLOW_RUN_ID."""
    collect_rarely()
    flush = relay_output()
    try:
        _run(UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
    finally:
        flush()


def _run(run_id: UUID) -> None:
    from flows.server.watch import ask_patiently, hold_run, watch_run

    with hold_run(run_id):
        entrypoint = ask_patiently(lambda: _entrypoint(run_id))
        if entrypoint is None:
            return
        os.environ["PREFECT__FLOW_ENTRYPOINT"] = str(entrypoint)
        with watch_run(run_id):
            sys.argv = ["prefect.engine", str(run_id)]
            runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def _entrypoint(run_id: UUID) -> str | None:
    """Return the entry point of a run's deployment. None: the deployment is unknown, and the run has failed."""
    from prefect.client.orchestration import get_client
    from prefect.states import Failed

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        name = None if run.deployment_id is None else client.read_deployment(run.deployment_id).name
        found = entrypoint_of(name or "")
        if found is None:
            text = f"{name or 'a run without deployment'}: not in this machine's prefect.yaml or ${FILES_VARIABLE}"
            client.set_flow_run_state(run_id, Failed(message=text), force=True)
    return found


if __name__ == "__main__":
    main()
