"""A report on disk and as a browser sees it, for the tests of both packages' reports."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

HEADINGS = ("h1", "h2", "h3", "h4")
LABELS = ("th", "dt")


class Page(html.parser.HTMLParser):
    """The report as a browser parses it: text, attributes and elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.labels: list[str] = []
        """Texts of th and dt."""
        self.styles = ""
        self.scripts: list[str] = []
        self.data: list[str] = []
        """Contents of script elements that are data."""
        self._data = False
        self.policy = ""
        """The page's Content-Security-Policy."""
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "every element is closed"
        self.words = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert not any(name.startswith("on") for name in values), "no event handlers"
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values.get("content") or ""
        if tag == "script":
            assert set(values) <= {"type", "id"}, "no script from elsewhere"
            self._data = values.get("type") == "application/json"
            (self.data if self._data else self.scripts).append("")
        if tag == "img":
            self.images.append(values)
        if tag in HEADINGS:
            self.headings.append("")
        if tag in LABELS:
            self.labels.append("")
        self.links.extend(value for name, value in attrs if name in ("href", "src", "action", "data") and value)
        self.ids.extend(value for name, value in attrs if name == "id" and value)
        if tag not in ("img", "meta", "br", "link", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.styles += data
            return
        if "script" in self._open:
            (self.data if self._data else self.scripts)[-1] += data
            return
        self._words.append(data)
        if set(HEADINGS) & set(self._open):
            self.headings[-1] += data
        if set(LABELS) & set(self._open):
            self.labels[-1] += f" {data}"

    @staticmethod
    def without_data(text: str) -> str:
        """Return a page without its styles, scripts and data."""
        return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)

    def assert_self_contained(self) -> None:
        """Check that the page loads nothing, runs the package's scripts, and that links have targets, pictures texts.

        Its policy has the scripts' digests, so a browser runs no other.
        """
        for link in self.links:
            assert link.startswith(("data:", "#"))
            if link.startswith("#"):
                assert link[1:] in self.ids
        digests = {base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in self.scripts}
        policy, _, scripts = self.policy.partition("; script-src ")
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        assert sorted(scripts.split()) == sorted(f"'sha256-{digest}'" for digest in digests)
        assert not {"link", "iframe", "object", "embed", "form"} & set(self.tags)
        assert self.styles.count("url(") == self.styles.count("url(data:")
        assert "@import" not in self.styles
        assert all(image.get("alt") for image in self.images)
        assert len(self.ids) == len(set(self.ids))


class WrittenReport:
    """The report in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.html = (folder / "report.html").read_text(encoding="utf-8")
        self.page = Page(self.html)
        self.json: Any = json.loads((folder / "report.json").read_text(encoding="utf-8"))

    def table(self, name: str) -> list[dict[str, str]]:
        """Return the rows of a CSV file."""
        with (self.folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
