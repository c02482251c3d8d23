"""Changes of the pages of Prefect's UI: they contact only the server that they came from, and advertise nothing.

Prefect's second UI requests analytics settings from a company each time it is opened, even with analytics switched off.
Both UIs load logos of block types from other hosts. In a hospital, no outside host may learn that a page was opened.
A policy in the pages makes the browser refuse such requests, also those of later versions of Prefect.

The server's setting against advertisements reaches a browser only after the login. Each page therefore stores it in the
browser under the name that Prefect's pages read.
"""

from __future__ import annotations

from pathlib import Path

from medad.base.errors import ConfigError
from medad.base.storage import write_bytes

POLICY = "; ".join(
    (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        # some browsers do not count a websocket to the page's own host as 'self'
        "connect-src 'self' ws: wss:",
        "form-action 'self'",
        "base-uri 'self'",
    )
)
ADVERTISEMENT_KEY = "prefect-show-promotional-content"
"""Name under which Prefect's pages store in the browser whether they advertise."""
_HEAD = "<head>"
_OURS = (
    f'{_HEAD}<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    f'<script>localStorage.setItem("{ADVERTISEMENT_KEY}", "false")</script>'
)


def change_pages(folder: Path) -> None:
    """Write the policy and the setting into the UI pages below `folder`, which the server lays out when it starts.

    Raises
    ------
    ConfigError
        A page does not have the structure that the supported version of Prefect gives it.
    """
    for page in sorted(folder.glob("*/index.html")):
        text = page.read_text(encoding="utf-8")
        if _OURS in text:
            continue
        if text.count(_HEAD) != 1:
            raise ConfigError(f"{page}: expected a page with exactly one {_HEAD}")
        write_bytes(page, text.replace(_HEAD, _OURS).encode())
