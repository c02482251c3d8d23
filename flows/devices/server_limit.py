"""The server's count of devices in use: a global concurrency limit of Prefect for this machine.

`adflows deploy` creates the limit, and $ADFLOWS_SERVER_LIMIT names it in the workers' environment. The slots of
`flows.devices.slots` already give each device to one step at a time. The limit shows the devices in the server's UI,
and an administrator can lower it there.
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
    """Hold one slot of the machine's limit on the server, if $ADFLOWS_SERVER_LIMIT is set.

    If the server disappears meanwhile, the step continues: its lease is lost, but the lock of the device is not.

    Raises
    ------
    ConfigError
        The limit does not exist on the server, or the server does not answer.
    StoppedError
        The flow was cancelled or interrupted.
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
            continue  # all slots are taken
        except Exception as error:
            raise ConfigError(f"{LIMIT_VARIABLE}={name}: the server has no such limit, or does not answer") from error
    else:
        raise StoppedError
    try:
        yield
    finally:
        try:
            held.close()
        except Exception as error:  # a server or the network can raise anything; the lease expires anyway
            get_run_logger().warning("the slot of limit %s could not be released: %s", name, type(error).__name__)
