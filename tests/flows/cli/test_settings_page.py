"""The page of settings: it matches the classes, and its descriptions are plain English."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from flows.cli.settings_page import CHAPTERS, description, settings_page
from medad.base.private import field_types, nested_types

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "settings.md"
LONGEST_SENTENCE = 25
BAD_STARTS = {"of", "what", "by", "whose", "none", "how", "where", "which", "whether"}


def models() -> Iterator[type[BaseModel]]:
    pending, seen = [chapter.model for chapter in CHAPTERS], set()
    while pending:
        model = pending.pop()
        if model not in seen:
            seen.add(model)
            yield model
            for kind in field_types(model).values():
                pending += [
                    part for part in nested_types(kind) if isinstance(part, type) and issubclass(part, BaseModel)
                ]


FIELDS = [(model, name) for model in models() for name in model.model_fields]


def test_the_page_is_what_the_classes_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), (
        "python -m flows.cli.settings_page > docs/reference/settings.md"
    )


def test_the_page_has_every_setting() -> None:
    assert len(FIELDS) > 250
    text = settings_page()
    missing = [name for _, name in FIELDS if not re.search(rf"^\| `([^`]*[. ])?{name}` \|", text, re.MULTILINE)]
    assert not missing


def test_known_rows_are_as_known_beforehand() -> None:
    rows = settings_page().splitlines()
    assert (
        "| `preprocess.slice_px` | integer 32 to 1024, multiple of 16 | `256` | Side of a slice, in pixels. |" in rows
    ), "an integer with limits"
    assert "| `train.flip` | true or false | `false` | Random flips of slices, left-right and front-back. |" in rows
    assert "| `data.categories` | list (text) or none | `null` | Categories to use. None: all. |" in rows
    (root,) = [row for row in rows if row.startswith("| `train_data.root` |")]
    assert root.startswith("| `train_data.root` | private text | needed | Folder of the data set.")
    (test_data,) = [row for row in rows if row.startswith("| `test_data` |")]
    assert test_data.startswith("| `test_data` | group, as `train_data` | needed |")
    (healthy,) = [row for row in rows if row.startswith("| `healthy` |")]
    assert "group, as `train_data` of [Liver run](#liver-run)" in healthy


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS])
def test_descriptions_begin_with_a_noun_and_have_short_sentences(model: type[BaseModel], name: str) -> None:
    text = description(model, name)
    assert text.endswith(".")
    assert text.split()[0].strip(":,").lower() not in BAD_STARTS
    for sentence in re.split(r"(?<=[.;:])\s", text):
        assert len(sentence.split()) <= LONGEST_SENTENCE, sentence


def test_the_page_is_made_without_anything_heavy() -> None:
    heavy = "torch", "numpy", "prefect"
    code = f"import sys, flows.cli.settings_page; sys.exit(sum(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
