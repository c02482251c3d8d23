"""Wait for a server that is away at the end of a run. Otherwise the run would end without its final state."""

from __future__ import annotations

import time

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from flows.machine.stopping import StoppedError, stopping
from flows.machine.terminal import terminal
from flows.runs.temporary_server import temporary_url

POLL_S = 5.0
LIMIT_S = 24 * 3600.0
"""Longest wait. After it, the run ends without telling the server."""


def wait_for_server() -> None:
    """Wait until the server of PREFECT_API_URL answers. A temporary server that has ended does not return.

    Raises
    ------
    StoppedError
        The flow was cancelled or interrupted.
    """
    if PREFECT_API_URL.value() in {None, temporary_url()}:
        return
    end, said = time.monotonic() + LIMIT_S, False
    while not _answers() and time.monotonic() < end:
        if not said:
            said = True
            text = "the work is done; waiting for the Prefect server, which does not answer"
            terminal.line(text)
            get_run_logger().warning(text)
        if stopping.wait(POLL_S):
            raise StoppedError


def _answers() -> bool:
    with get_client(sync_client=True) as client:
        return client.api_healthcheck() is None
