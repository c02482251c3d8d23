"""Finds prose in files: docstrings, comments and Markdown paragraphs, with the line where each begins."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("flows", "medad", "zsad", "tests", "benchmarks", "docs")
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|pragma|ruff:|mypy:|%%|!)")


@dataclass(frozen=True)
class Prose:
    """A docstring, a comment or a paragraph."""

    path: Path
    line: int
    text: str

    @property
    def place(self) -> str:
        """File and line, as editors open them."""
        return f"{name_of(self.path)}:{self.line}"


def name_of(path: Path) -> str:
    """Return a file's path below the repository's root."""
    return path.relative_to(ROOT).as_posix()


def python_files() -> list[Path]:
    """Return all Python files of the repository."""
    return [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]


def markdown_files() -> list[Path]:
    """Return all Markdown files of the repository."""
    return sorted([*ROOT.glob("*.md"), *(path for room in ("docs", "medad", "zsad") for path in (ROOT / room).rglob("*.md"))])


def docstrings(path: Path) -> Iterator[Prose]:
    """Yield docstrings of modules, classes and functions, and the strings below fields and constants."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", ())
        for child in body if isinstance(body, list) else ():  # a lambda's body is one expression
            match child:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield Prose(path, child.lineno, text.strip())


def comments(path: Path) -> Iterator[Prose]:
    """Yield comments. Consecutive lines with only comments are one text."""
    found: list[tuple[int, bool, str]] = []
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or _DIRECTIVE.match(token.string):
            continue
        row, column = token.start
        own_line = not token.line[:column].strip()
        text = token.string.lstrip("#: ").strip()
        if found and own_line and found[-1][1] and found[-1][0] == row - 1:
            found[-1] = (row, True, f"{found[-1][2]} {text}")
        else:
            found.append((row, own_line, text))
    yield from (Prose(path, row, text) for row, _, text in found)


def paragraphs(path: Path) -> Iterator[Prose]:
    """Yield paragraphs and list items of a Markdown file, without code blocks and tables."""
    lines: list[str] = []
    begin, in_code = 0, False
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        bare = line.strip()
        breaks = in_code or bare.startswith(("```", "|", "#", "![", "<")) or not bare
        if (breaks or re.match(r"([-*]|[0-9]+\.) ", bare)) and lines:
            yield Prose(path, begin, " ".join(lines))
            lines = []
        if not breaks:
            begin = begin if lines else number
            lines.append(re.sub(r"^([-*]|[0-9]+\.) ", "", bare))


def sentences(text: str) -> list[str]:
    """Split a text at the ends of its sentences. Code, links, tables and section heads of docstrings are cut out."""
    text = re.sub(r"^\s*[|>].*$|^\s*-{3,}\s*$|^ {4,}\S.*$", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|`+[^`]*`+", " x ", text)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=\s*[-*] )", text):
        found += re.split(r"(?<=[.!?:])\s+", " ".join(block.split()))
    return found


def word_count(sentence: str) -> int:
    """Count the words of a sentence; numbers and signs are not words."""
    return sum(any(character.isalpha() for character in word) for word in sentence.split())
