"""The values shown for private fields, and for changes of such fields by dotted key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from medad.base.private import (
    DataRoot,
    ModelFile,
    ModelName,
    PrivateCases,
    PrivateExpression,
    PrivatePath,
    PrivatePattern,
    changes_of,
    is_private,
    type_at,
)
from medad.base.settings import Settings
from medad.base.text import PLACEHOLDER


class Inner(Settings):
    root: DataRoot = "samples:lits"
    size: float = 1.0


class Outer(Settings):
    inner: Inner | None = None
    many: dict[str, Inner] = Field(default_factory=dict)
    file: Annotated[ModelFile | None, Field(min_length=1)] = None
    model: ModelName = "ViT-B-16"
    path: PrivatePath = Path("/share/doe_jane")
    pattern: PrivatePattern | None = None
    patients: PrivateExpression = r"^lits-(\d+)"
    cases: PrivateCases | None = None


class Changed(Settings):
    values: Annotated[dict[str, Any], changes_of(Outer)]


def shown(**values: Any) -> dict[str, Any]:
    outer = Outer.model_validate(values)
    assert Outer.model_validate_json(outer.model_dump_json()), "what is shown is also valid"
    assert outer.public() == json.loads(outer.model_dump_json())
    return outer.public()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("file", "/share/doe_jane/vit.pt", f"{PLACEHOLDER}/vit.pt"),
        ("file", None, None),
        ("model", "local-dir:/share/doe_jane", f"local-dir:{PLACEHOLDER}"),
        ("model", "ViT-B-16", "ViT-B-16"),
        ("path", "/share/doe_jane", PLACEHOLDER),
        ("pattern", "images/*.nii.gz", "images/*.nii.gz"),
        ("pattern", "doe_jane/*.nii", f"{PLACEHOLDER}/*"),
        ("patients", r"patient_(\w+)_scan", r"patient_(\w+)_scan"),
        ("patients", "^(Doe|Roe)-", PLACEHOLDER),
        ("patients", r"^(4711\d)-", PLACEHOLDER),
        ("cases", ["lits-17", "ct-0123456789ab", "doe_jane"], ["lits-17", "ct-0123456789ab", PLACEHOLDER]),
        ("cases", None, None),
        ("inner", {"root": "/share/doe_jane"}, {"root": PLACEHOLDER, "size": 1.0}),
        ("inner", {"root": "samples:lits"}, {"root": "samples:lits", "size": 1.0}),
        ("many", {"a": {"root": "/share/doe_jane"}}, {"a": {"root": PLACEHOLDER, "size": 1.0}}),
    ],
)
def test_json_holds_what_may_be_shown(field: str, value: Any, expected: Any) -> None:
    assert shown(**{field: value})[field] == expected


def test_python_mode_holds_the_true_values() -> None:
    assert Outer().model_dump()["path"] == Path("/share/doe_jane")
    assert Outer(file="/a/b").file == "/a/b"


def test_fields_can_be_left_out() -> None:
    assert "path" not in Outer().public("path", "inner")
    assert "model" in Outer().public("path", "inner")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("inner.root", "/share/doe_jane", PLACEHOLDER),
        ("inner.root", "samples:lits", "samples:lits"),
        ("inner.size", 3, 3),
        ("inner", {"root": "/share/doe_jane", "size": 3}, {"root": PLACEHOLDER, "size": 3}),
        ("inner", "doe_jane", PLACEHOLDER),
        ("many.a.root", "/share/doe_jane", PLACEHOLDER),
        ("cases", ["lits-17", "doe_jane"], ["lits-17", PLACEHOLDER]),
        ("cases", None, None),
        ("cases", {"first": "doe_jane"}, {"first": PLACEHOLDER}),
        ("file", "/doe_jane/a.pt", f"{PLACEHOLDER}/a.pt"),
        ("no.such.key", "doe_jane", PLACEHOLDER),
        ("inner.no", ["doe_jane"], PLACEHOLDER),
    ],
)
def test_changes_are_withheld_as_the_fields_that_they_change(key: str, value: Any, expected: Any) -> None:
    changed = Changed(values={key: value})
    assert changed.values == {key: value}
    assert changed.public() == {"values": {key: expected}}


def test_a_type_is_private_where_anything_in_it_is() -> None:
    assert is_private(type_at(Outer, "inner.root"))
    assert is_private(type_at(Outer, "inner"))
    assert not is_private(type_at(Outer, "inner.size"))
    assert not is_private(type_at(Outer, "inner.no"))
