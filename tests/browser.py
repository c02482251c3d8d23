"""Chromium without a window, for tests of what a page does. They skip, saying so, where it is not installed."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect
from websockets.sync.connection import Connection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
)

_KEY_CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39}
_UNNAMED = """
return [...document.querySelectorAll('button, input, select, a, [role=img], img')].filter((each) => {
  const label = each.labels?.[0]?.textContent || each.ariaLabel || each.alt || each.title || each.textContent;
  return !label.trim();
}).map((each) => each.outerHTML.slice(0, 200));
"""


class OpenPage:
    """A page that is open in the browser."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._number = connection, 0
        self.problems: list[str] = []
        """Errors of scripts and of the console, and requests that leave the page."""

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, values = event["method"], event["params"]
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(values["exceptionDetails"]["text"]))
        if method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.problems.append(values["entry"]["text"])
        if method == "Network.requestWillBeSent" and not values["request"]["url"].startswith(
            ("file:", "data:", "blob:")
        ):
            self.problems.append(values["request"]["url"])

    def go(self, page: Path) -> None:
        """Open a file."""
        self.send("Page.navigate", url=page.as_uri())
        self.ask("while (document.readyState !== 'complete') await new Promise((done) => setTimeout(done, 20));")

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        values = {"key": key, "windowsVirtualKeyCode": _KEY_CODES.get(key, 0)}
        self.send("Input.dispatchKeyEvent", type="keyDown", **values, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **values)

    def ask(self, code: str) -> Any:
        """Return what the body of an asynchronous JavaScript function returns."""
        found = self.send(
            "Runtime.evaluate", expression=f"(async () => {{ {code} }})()", awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")


def assert_sound(page: OpenPage) -> None:
    """Check the open page: no errors and no foreign requests, no sideways scrolling, a name for each control."""
    assert page.problems == []
    assert page.ask("return document.documentElement.scrollWidth - innerWidth;") <= 0
    assert page.ask(_UNNAMED) == []


@contextlib.contextmanager
def opened(page: Path, folder: Path, *, width: int = 1200) -> Iterator[OpenPage]:
    """Open a file in a new browser whose profile is in a folder."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},900", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            place, end = profile / "DevToolsActivePort", time.monotonic() + 60
            while not place.exists() or len(place.read_text(encoding="utf-8").splitlines()) < 2:
                assert time.monotonic() < end
                time.sleep(0.05)
            port = place.read_text(encoding="utf-8").splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
                [target] = [each for each in json.load(answer) if each["type"] == "page"]
            with connect(target["webSocketDebuggerUrl"], max_size=None, compression=None, proxy=None) as connection:
                found = OpenPage(connection)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    found.send(f"{domain}.enable")
                found.send("Emulation.setFocusEmulationEnabled", enabled=True)
                found.go(page)
                yield found
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(profile, ignore_errors=True)
