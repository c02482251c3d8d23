"""The UI may talk to the server that it came from, and to nobody else.

Prefect's second UI asks a company for analytics settings whenever it is opened, with analytics switched off too, and
both load logos of block types from elsewhere: in a hospital nobody is to be told that a page was opened. A policy in
the pages themselves makes the browser refuse it, whatever a later version of Prefect may ask for.
"""

from __future__ import annotations

from pathlib import Path

from medad.base.errors import ConfigError
from medad.base.storage import write_bytes

POLICY = "; ".join(
    (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        # not every browser takes a websocket of the page's own host for 'self'
        "connect-src 'self' ws: wss:",
        "form-action 'self'",
        "base-uri 'self'",
    )
)
_HEAD = "<head>"
_META = f'{_HEAD}<meta http-equiv="Content-Security-Policy" content="{POLICY}">'


def forbid_other_hosts(folder: Path) -> None:
    """Put the policy into the pages that a server which has started has laid out below `folder`, if it has any.

    Raises
    ------
    ConfigError
        A page is not as it was in the Prefect that this was written for.
    """
    for page in sorted(folder.glob("*/index.html")):
        text = page.read_text(encoding="utf-8")
        if _META in text:
            continue
        if text.count(_HEAD) != 1:
            raise ConfigError(f"{page}: expected a page with one {_HEAD}")
        write_bytes(page, text.replace(_HEAD, _META).encode())
