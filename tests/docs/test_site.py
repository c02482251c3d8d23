"""The site builds without a warning, loads nothing from elsewhere, and no relative link of a document is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.pages import DOCS
from tests.prose import ROOT, markdown_files, name_of

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}
"""Relations of `link` that a browser does not load."""


class Resources(HTMLParser):
    """Collector of the addresses that a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        relation = set((values.get("rel") or "").split())
        address = values.get(LOADING.get(tag, ""))
        if address is not None and not relation & NOT_LOADED:
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings end the build."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True, encoding="utf-8", check=False, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert resources.found
        for address in resources.found:
            assert not re.match(r"([a-z]+:)?//", address), f"{page.name}: {address}"
            if not address.startswith("data:") and page.name != "404.html":
                assert (page.parent / address.partition("?")[0].partition("#")[0]).exists(), f"{page.name}: {address}"


def test_styles_load_nothing_from_elsewhere(site: Path) -> None:
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_search_works_from_files(site: Path) -> None:
    assert (site / "search" / "search_index.js").is_file()


def test_the_site_links_files_not_folders(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="getting-started/liver.html"' in home


@pytest.mark.parametrize("page", [name_of(path) for path in markdown_files()])
def test_relative_links_resolve(page: str) -> None:
    path = ROOT / page
    for target in _LINK.findall(_CODE.sub("", path.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{page}: {target}"
            if DOCS in path.parents:
                resolved = (path.parent / target.partition("#")[0]).resolve()
                assert DOCS in resolved.parents, f"{page}: {target} is not in the site"
