"""A server for the files of one folder, such as a run's report: on this machine only, and behind a token for one use.

The address has a token. The first browser that opens it gets a cookie, and then the token is used up. Another user of
the machine who sees the address in a list of processes or in a history cannot use it.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from flows.machine.environment import LOCAL_HOSTS
from flows.server.files import HEADERS, file_answer, text_answer
from medad.base.errors import ConfigError

FIRST_PAGES = ("report.html", "index.html")
_COOKIE = "adflows-open"


def first_page(folder: Path) -> str:
    """Return the page that a folder is opened with: a run's report, or the page of all runs. Raises ConfigError."""
    for name in FIRST_PAGES:
        if (folder / name).is_file():
            return name
    raise ConfigError(f"{folder}: has neither a report ({FIRST_PAGES[0]}) nor a page of runs ({FIRST_PAGES[1]})")


def make_app(folder: Path, token: str) -> Starlette:
    """Return the application that serves a folder to whoever opens `/?token=TOKEN` first."""
    root, page, session = folder.resolve(), first_page(folder), secrets.token_urlsafe(32)
    unused = [token]

    def start(request: Request) -> Response:
        given = request.query_params.get("token")
        if given is not None and unused and secrets.compare_digest(given, unused[0]):
            unused.clear()
            response: Response = RedirectResponse(f"/{page}", headers=HEADERS)
            # the port is part of the name, because browsers send cookies of a host to all its ports
            response.set_cookie(f"{_COOKIE}-{request.url.port}", session, httponly=True, samesite="strict")
            return response
        return RedirectResponse(f"/{page}", headers=HEADERS) if _is_known(request, session) else _refusal()

    def serve(request: Request) -> Response:
        if not _is_known(request, session):
            return _refusal()
        return file_answer(root, request.path_params["path"])

    return Starlette(
        routes=[Route("/", start), Route("/{path:path}", serve)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL_HOSTS), www_redirect=False)],
    )


def _is_known(request: Request, session: str) -> bool:
    return secrets.compare_digest(request.cookies.get(f"{_COOKIE}-{request.url.port}", ""), session)


def _refusal() -> Response:
    return text_answer(
        403, "This address was opened before, by another browser perhaps. Run `adflows open` again for a new one."
    )


def open_folder(folder: Path, port: int) -> tuple[uvicorn.Server, socket.socket, str]:
    """Return a server for a folder, its socket and the address to open. Port 0: any free one.

    Raises
    ------
    ConfigError
        The folder has no page, or the port is in use.
    """
    token = secrets.token_urlsafe(24)
    app = make_app(folder, token)
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ConfigError(f"port {port}: cannot listen on 127.0.0.1 ({error.strerror}); choose another") from error
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
    return server, listening, f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
