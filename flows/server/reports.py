"""The runs' reports beside Prefect's UI, at `/reports/`, behind the secret of the server.

A browser asks for the secret once. A page gets an origin of its own (`sandbox`), so that its script cannot read what
the UI keeps in the browser.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.runs.runs_page import PAGE
from flows.runs.ui_artifacts import REPORTS
from flows.server.files import file_answer, text_answer

_SANDBOX = "sandbox allow-scripts allow-downloads allow-popups allow-modals"


def with_reports(application: ASGIApp, root: Path, secret: str | None) -> ASGIApp:
    """Return an application that also answers with the files of the runs' folder `root` below `/reports/`.

    Requests must have the secret `user:password` (HTTP basic authentication). Without a secret all are refused.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == REPORTS or path.startswith(f"{REPORTS}/")):
            await _answer(Request(scope), root.resolve(), secret)(scope, receive, send)
        else:
            await application(scope, receive, send)

    return answer


def _answer(request: Request, root: Path, secret: str | None) -> Response:
    if not secret or not _has_secret(request, secret):
        return text_answer(
            401, "`adflows secret` shows the user and the password.", WWW_Authenticate='Basic realm="adflows"'
        )
    if request.method not in ("GET", "HEAD"):
        return text_answer(405, "only GET")
    path = request.url.path.removeprefix(REPORTS)
    if not path:
        return RedirectResponse(f"{REPORTS}/")
    relative = request.scope["path"].removeprefix(f"{REPORTS}/") or PAGE
    found = file_answer(root, relative)
    if found.status_code == 404 and relative == PAGE:
        return text_answer(404, f"{PAGE}: no run has ended yet")
    found.headers["Content-Security-Policy"] = _SANDBOX
    return found


def _has_secret(request: Request, secret: str) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    try:
        decoded = base64.b64decode(given.strip(), validate=True)
    except (binascii.Error, ValueError):
        return False
    return kind.lower() == "basic" and secrets.compare_digest(decoded, secret.encode())
