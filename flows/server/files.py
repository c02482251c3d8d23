"""Answers with the files of one folder: nothing outside it, nothing hidden, and no other site's page may use them."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import FileResponse, PlainTextResponse, Response

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def file_answer(root: Path, path: str) -> Response:
    """Return the file at a path with slashes below a folder, or 404.

    A link that leaves the folder, and names that begin with a dot, are not found. `root` must be resolved.
    """
    parts = path.split("/")
    try:
        file = root.joinpath(*parts).resolve()
        found = not any(part.startswith(".") for part in parts) and file.is_relative_to(root) and file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    return FileResponse(file, headers=HEADERS) if found else text_answer(404, "no such file")


def text_answer(status: int, text: str, **headers: str) -> Response:
    """Return a short text with the headers of all answers."""
    return PlainTextResponse(text, status, headers=HEADERS | {key.replace("_", "-"): headers[key] for key in headers})
