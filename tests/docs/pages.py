"""Reads the pages: fenced blocks, and the commands in blocks and in inline code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.prose import ROOT, markdown_files, name_of

DOCS = ROOT / "docs"
_FENCE = re.compile(r"^( *)```([\w-]*)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([^"]+)"')
_INLINE = re.compile(r"`+([^`]*)`+")
_SEPARATORS = re.compile(r"&&|\|\||[;|()]")
_ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str | None
    text: str
    follows: bool
    """Whether nothing but an empty line separates it from the block before it."""

    @property
    def place(self) -> str:
        """Page and line, as editors open them."""
        return f"{self.page}:{self.line}"

    @property
    def key(self) -> tuple[str, str]:
        """Page and first line of the text, which name the block in tables of tests."""
        return self.page, self.text.strip().splitlines()[0].strip()


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, indented ones without their indent."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        indent, language, rest, body = match.groups()
        title = _TITLE.search(rest)
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        number = text.count("\n", 0, match.start()) + 1
        follows = bool(found) and not text[end : match.start()].strip()
        found.append(Block(page, number, language, title[1] if title else None, "\n".join(lines), follows))
        end = match.end()
    return found


def guide_pages() -> list[str]:
    """Return the pages that lead a reader through commands."""
    return [name_of(path) for folder in ("getting-started", "how-to") for path in sorted((DOCS / folder).glob("*.md"))]


def logical_lines(script: str) -> list[str]:
    """Return the lines of a shell script without comments, continued lines joined."""
    lines = script.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def arguments(line: str) -> list[str]:
    """Split a line of shell into words, without its comment."""
    return shlex.split(line, comments=True)


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each call of `adflows` in a shell script, the first one excluded."""
    for line in logical_lines(text):
        for part in _SEPARATORS.split(line):
            try:
                words = arguments(part.replace("$", ""))
            except ValueError:  # a quote that another part closes
                words = part.split()
            while words and (_ASSIGNMENT.match(words[0]) or words[0] in ("do", "sudo", "-E", "nohup", "time")):
                words = words[1:]
            if words[:1] == ["-u"]:
                words = words[2:]
            if words and Path(words[0]).name == "adflows":
                yield words[1:]


def documented_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the words of each `adflows ...` in blocks and inline code of all documents."""
    for path in markdown_files():
        text = path.read_text(encoding="utf-8")
        for block in blocks(name_of(path)):
            if block.language in ("", "bash", "console", "sh", "text"):
                yield from ((block.place, words) for words in commands_in(block.text))
        for number, line in enumerate(_FENCE.sub(_blank, text).splitlines(), start=1):
            for match in _INLINE.finditer(line):
                yield from ((f"{name_of(path)}:{number}", words) for words in commands_in(match[1]))


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")
