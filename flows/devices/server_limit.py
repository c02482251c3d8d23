"""A server's own count of the devices in use: the global concurrency limit of this machine, where one is set up.

Slots (`flows.devices.slots`) keep devices apart by themselves; the limit, which `adflows deploy` makes, lets the
server and its UI see them, and its administrator lower them. `$ADFLOWS_SERVER_LIMIT` names it in the environment of
the workers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger

from flows.machine.stopping import StoppedError, stopping
from medad.base.errors import ConfigError

LIMIT_VARIABLE = "ADFLOWS_SERVER_LIMIT"
POLL_S = 5.0


@contextlib.contextmanager
def server_slot() -> Iterator[None]:
    """Hold one slot of the machine's limit on the server, if there is one.

    A server that goes away meanwhile costs no work: the lease is lost, the device's own lock is not.

    Raises
    ------
    ConfigError
        The limit is not on the server, or the server cannot be asked.
    StoppedError
        The flow is being ended from outside.
    """
    name = os.environ.get(LIMIT_VARIABLE)
    if not name:
        yield
        return
    held = contextlib.ExitStack()
    while not stopping.is_set():
        try:
            held.enter_context(
                concurrency(name, occupy=1, strict=True, timeout_seconds=POLL_S, raise_on_lease_renewal_failure=False)
            )
            break
        except TimeoutError:
            continue  # all taken
        except Exception as error:
            raise ConfigError(f"{LIMIT_VARIABLE}={name}: no such limit on the server, or no answer from it") from error
    else:
        raise StoppedError
    try:
        yield
    finally:
        try:
            held.close()
        except Exception as error:  # whatever a server or the way to it can raise: the lease runs out by itself
            get_run_logger().warning("the limit %s could not be given back: %s", name, type(error).__name__)
