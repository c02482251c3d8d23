"""Chromium without a window, for tests of what a page does. They skip, saying so, where it is not installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000"),
)
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="[^"]*">')


def dom_of(page: Path, folder: Path, *, width: int = 1200) -> str:
    """Return a page's elements as HTML after its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, check=True, encoding="utf-8", timeout=120)
    return done.stdout


def ask(page: Path, folder: Path, question: str, *, width: int = 1200) -> Any:
    """Return the JSON value of a JavaScript function body that runs after a copy of the page has loaded.

    The copy has no Content-Security-Policy, which would forbid the function.
    """
    text, count = _POLICY.subn("", page.read_text(encoding="utf-8"))
    assert count == 1
    code = f"document.title = JSON.stringify((() => {{ {question} }})());"
    copy = folder / f"asked-{page.name}"
    copy.write_text(text.replace("</body>", f"<script>{code}</script></body>"), encoding="utf-8")
    found = re.search(r"<title>(.*?)</title>", dom_of(copy, folder, width=width), re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found.group(1)))
