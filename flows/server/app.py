"""The program of the server: Prefect's application and the runs' reports, for the host names that it is meant to have.

A page of another site can let its own name resolve to 127.0.0.1, and a browser then sends it to this server. Such a
request has the other site's name in its header `Host`, and gets no answer.

    python -m flows.server.app
"""

from __future__ import annotations

import asyncio
import os
from urllib.parse import urlsplit

from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.machine.environment import LOCAL_HOSTS, runs_root
from flows.server.automations import restart_deadlines
from flows.server.reports import with_reports

HOSTS_VARIABLE = "ADFLOWS_HOSTS"
_BROWSER_VARIABLES = ("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "PREFECT_UI_URL")


def allowed_hosts() -> list[str]:
    """Return the host names under which the server answers.

    They are this machine's loopback names, the hosts of the addresses that browsers use, and those of $ADFLOWS_HOSTS.
    """
    origins = [part for name in _BROWSER_VARIABLES for part in os.environ.get(name, "").split(",")]
    hosts = [urlsplit(origin.strip()).hostname or "" for origin in origins]
    hosts += [host.strip().lower() for host in os.environ.get(HOSTS_VARIABLE, "").split(",")]
    return list(dict.fromkeys([*LOCAL_HOSTS, *(host for host in hosts if host and "*" not in host)]))


def application() -> TrustedHostMiddleware:
    """Return Prefect's application and the runs' reports behind a check of the host name."""
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    secret = get_current_settings().server.api.auth_string
    shown = None if secret is None else secret.get_secret_value()
    app = with_reports(create_app(final=True), runs_root(), shown)
    return TrustedHostMiddleware(app, allowed_hosts(), www_redirect=False)


def main() -> None:
    """Run the server until a signal. Prefect's settings say where it listens."""
    import uvicorn
    from prefect.settings import get_current_settings

    asyncio.run(restart_deadlines())
    settings = get_current_settings().server
    uvicorn.run(
        application(),
        host=settings.api.host,
        port=settings.api.port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        log_level=settings.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
