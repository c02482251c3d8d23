"""The import rules, kept by reading every file's syntax tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "medad", "zsad")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
EVERYTHING = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]

ENGINES = {"dask", "distributed", "prefect_dask", "prefect_ray"}
"""In `flows.devices.engines` alone, when they are asked for: they carry tasks."""
FLOWS_MAY = {"prefect", "pydantic", "pydantic_core", "typer", "rich", "yaml", "medad", "zsad", "flows"}
"""Orchestration: with these, and the standard library, nothing can be computed."""
LEAVES = {
    f"medad.{name}" for name in ("devices", "errors", "noise", "pages", "progress", "settings", "storage", "words")
}
"""What both fields of work share; they know nothing of either."""


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of imported modules, and for `from a import b` also a.b; the level of relative ones."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.level


def tops(path: Path) -> set[str]:
    return {name.split(".", maxsplit=1)[0] for name, _ in imports(path)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[-2] == "flows"], ids=name_of)
def test_flows_orchestrates_and_cannot_compute(path: Path) -> None:
    allowed = FLOWS_MAY | (ENGINES if path.name == "engines.py" else set())
    foreign = tops(path) - allowed - sys.stdlib_module_names
    assert not foreign, f"flows imports {sorted(foreign)}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.relative_to(ROOT).parts[0] == "medad"], ids=name_of)
def test_medad_knows_neither_prefect_nor_its_users(path: Path) -> None:
    assert not tops(path) & {"prefect", "flows", "zsad", "typer"}


@pytest.mark.parametrize("path", [p for p in MODULES if p.relative_to(ROOT).parts[0] == "zsad"], ids=name_of)
def test_zsad_takes_leaves_from_medad_and_nothing_else(path: Path) -> None:
    assert not tops(path) & {"prefect", "flows", "typer"}
    ours = {".".join(name.split(".")[:2]) for name, _ in imports(path) if name.split(".", maxsplit=1)[0] == "medad"}
    assert ours - {"medad"} <= LEAVES


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_nothing_of_ours_but_leaves(leaf: str) -> None:
    ours = {name for name, _ in imports(ROOT / f"{leaf.replace('.', '/')}.py") if name.split(".")[0] in PACKAGES}
    assert {".".join(name.split(".")[:2]) for name in ours} <= LEAVES


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_imports_are_absolute(path: Path) -> None:
    assert all(level == 0 for _, level in imports(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_init_holds_a_docstring_alone(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    names = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "helpers", "misc"}
