"""The rules for English of CONTRIBUTING.md, as far as a program can keep them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prose import (
    ROOT,
    Prose,
    comments,
    docstrings,
    markdown_files,
    name_of,
    paragraphs,
    python_files,
    sentences,
    word_count,
)

LONGEST_LINE = 120
LONGEST_SENTENCE = 25
BEGINNINGS = re.compile(r"(Of|What|By what|Whose|None:)(?![\w-])")
"""No docstring and no comment of a field begins with these."""
PHRASES = re.compile(
    r"\b(whatever|for ever|lest|goes by|is told|says again|plays no part|put over|made anew|anew|yardstick|artefacts?"
    r"|is no (?!longer|more)|are no (?!longer|more)|opaque ids?|planted)\b",
    re.IGNORECASE,
)
"""Phrases that a reader must translate, and words that the glossary replaces."""
RULES = ("CONTRIBUTING.md", "docs/reference/glossary.md", "CHANGELOG.md", "tests/test_prose.py")
"""Files that name the phrases in order to forbid or replace them."""


def _places(found: Iterator[tuple[Prose, str]]) -> str:
    return "\n".join(f"{prose.place}: {what}" for prose, what in found)


def _all_prose() -> list[Prose]:
    code = [prose for path in python_files() for prose in (*docstrings(path), *comments(path))]
    return [*code, *(prose for path in markdown_files() for prose in paragraphs(path))]


ALL = _all_prose()


def test_the_finder_sees_docstrings_comments_and_paragraphs() -> None:
    assert len(ALL) > 4000
    assert {"py", "md"} == {prose.path.suffix[1:] for prose in ALL}
    here = [prose.text for prose in docstrings(ROOT / "tests" / "prose.py")]
    assert "File and line, as editors open them." in here


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = (prose for path in python_files() for prose in docstrings(path))
    assert not (bad := _places((prose, prose.text[:60]) for prose in found if BEGINNINGS.match(prose.text))), bad


def test_no_phrase_needs_translation() -> None:
    found = (
        (prose, match[0]) for prose in ALL if name_of(prose.path) not in RULES and (match := PHRASES.search(prose.text))
    )
    assert not (bad := _places(found)), bad


def test_messages_need_no_translation_either() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {match[0]}"
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in ("flows", "medad", "zsad")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := PHRASES.search(node.value))
    ]
    assert not found, "\n".join(found)


def test_sentences_are_short() -> None:
    found = (
        (prose, f"{word_count(sentence)} words: {sentence[:70]}...")
        for prose in ALL
        for sentence in sentences(prose.text)
        if word_count(sentence) > LONGEST_SENTENCE
    )
    assert not (bad := _places(found)), bad


@pytest.mark.parametrize("path", markdown_files(), ids=name_of)
def test_lines_of_prose_are_short(path: Path) -> None:
    bad, in_code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        in_code ^= line.lstrip().startswith("```")
        if len(line) > LONGEST_LINE and not in_code and not line.startswith("|") and " " in line.strip():
            bad.append(f"{path}:{number}: {len(line)} columns")
    assert not bad, "\n".join(bad)
