"""The import rules: which package may import which. The test reads every file's syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "medad", "zsad")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
EVERYTHING = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
LONGEST_MODULE = 400

DOORS = {"medad/__init__.py", "zsad/__init__.py"}
"""Packages with a Python interface in `__init__`, besides the docstring. It loads nothing until it is used."""

ROOMS = {
    "flows": "",
    "flows.machine": "medad.base",
    "flows.store": "flows.machine medad.base medad.ct",
    "flows.privacy": "flows.store flows.machine medad.base medad.config medad.ct zsad.config",
    "flows.devices": "flows.privacy flows.store flows.machine medad.base",
    # the page of all runs is made of the reports' parts
    "flows.runs": "flows.devices flows.privacy flows.store flows.machine medad.base medad.reporting",
    "flows.liver": "flows.runs flows.devices flows.privacy flows.store flows.machine"
    " medad.base medad.config medad.cohort medad.ct medad.organ medad.steps medad.reports medad.dicom_out",
    "flows.zsad": "flows.runs flows.devices flows.privacy flows.store flows.machine"
    # a key names weights and prompts by content; zsad.clip finds both without loading a model
    " medad.base medad.cohort zsad.config zsad.data zsad.clip zsad.embedded zsad.steps zsad.reports",
    "flows.inbox": "flows.liver flows.runs flows.devices flows.privacy flows.store flows.machine"
    " medad.base medad.config medad.cohort medad.ct medad.steps",
    # a node sends the DICOM results that the liver flows write
    "flows.node": "flows.liver flows.privacy flows.machine medad.base medad.config",
    "flows.server": "flows.liver flows.zsad flows.inbox flows.runs flows.devices flows.privacy flows.store"
    " flows.machine medad.base medad.config zsad.config",
    # `liver view` writes a page of a run that has ended, so no flow does
    "flows.cli": "flows.inbox flows.node flows.server flows.liver flows.zsad flows.runs flows.devices flows.privacy"
    " flows.store flows.machine medad.base medad.config medad.cohort medad.ct medad.steps medad.reports zsad.config"
    " zsad.steps zsad.clip zsad.embedded",
    "medad": "medad.steps medad.cohort medad.evaluation medad.ct medad.config medad.base",
    "medad.base": "",
    "medad.reporting": "medad.base",
    "medad.config": "medad.base",
    "medad.ct": "medad.base",
    "medad.slices": "medad.ct medad.config medad.base",
    "medad.anomalies": "medad.slices medad.config medad.base",
    "medad.cohort": "medad.anomalies medad.ct medad.config medad.base",
    "medad.evaluation": "medad.classifier medad.anomalies medad.config medad.base",
    "medad.networks": "medad.anomalies medad.slices medad.config medad.base",
    "medad.classifier": "medad.anomalies medad.slices medad.config medad.base",
    "medad.models": "medad.networks medad.steps medad.config medad.base",
    "medad.organ": "medad.ct medad.base",
    # results for the archive label the lesions as the lesion table does
    "medad.dicom_out": "medad.evaluation medad.ct medad.base",
    "medad.steps": "medad.organ medad.classifier medad.cohort medad.evaluation medad.networks medad.anomalies"
    " medad.slices medad.ct medad.config medad.base",
    # the viewer shows the whole scan
    "medad.reports": "medad.steps medad.cohort medad.evaluation medad.slices medad.ct medad.config medad.reporting"
    " medad.base",
    "zsad": "zsad.steps zsad.scorers zsad.clip zsad.data zsad.config medad.base",
    "zsad.config": "medad.base",
    "zsad.data": "zsad.config medad.base",
    "zsad.clip": "zsad.data zsad.config medad.base",
    "zsad.evaluation": "medad.base",
    "zsad.scorers": "zsad.clip zsad.data zsad.config medad.base",
    "zsad.embedded": "zsad.clip zsad.data medad.base",
    "zsad.steps": "zsad.scorers zsad.evaluation zsad.clip zsad.data zsad.config medad.base",
    "zsad.reports": "zsad.steps zsad.scorers zsad.evaluation zsad.clip zsad.data zsad.config"
    " medad.reporting medad.base",
}
"""Room (package) -> rooms that it may import besides itself. A commit that adds an entry gives the reason."""
FOREIGN = {
    # orchestration: these libraries and the standard library cannot compute results
    # Prefect's server is an application of starlette that uvicorn runs, and its client is httpx's
    "flows": {"prefect", "pydantic", "pydantic_core", "typer", "rich", "yaml", "starlette", "uvicorn", "httpx"},
}
ENGINES = {"dask", "distributed", "prefect_dask", "prefect_ray", "ray"}
"""Libraries that run tasks. Only `flows.devices.engines` and `.cluster` import them, when needed."""
DICOM = {"pydicom", "pynetdicom"}
"""Libraries of DICOM's network protocol. Only `flows.node` imports them, and decodes nothing but UIDs."""
NEVER = {"prefect", "typer"}
"""Libraries that medad and zsad must not import."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the full names of imported modules with their level; for `from a import b` also a.b."""
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


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def room_of(module: str) -> str:
    """Return the room of a module: `flows.liver` for `flows.liver.steps`, or the top package.

    The settings of an image method count as `zsad.config`, though they are in the method's folder. So a method is one
    folder. Configuration, flows and the command line read the settings, and loading them must not load torch.
    """
    parts = module.split(".")
    if parts[:2] == ["zsad", "scorers"] and parts[-1] == "settings":
        return "zsad.config"
    room = ".".join(parts[:2])
    return room if room in ROOMS else parts[0]


KNOWN = {module_of(path) for path in MODULES}


def ours(path: Path) -> set[str]:
    """Return the modules of this repository that a file imports."""
    return {name for name, _ in imports(path) if name in KNOWN and name not in PACKAGES}


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__main__.py"], ids=name_of)
def test_rooms_import_the_rooms_below_them(path: Path) -> None:
    room = room_of(module_of(path))
    found = {room_of(module) for module in ours(path)} - {room}
    assert found <= set(ROOMS[room].split()), f"{room} imports {sorted(found - set(ROOMS[room].split()))}"


def test_every_folder_is_a_room() -> None:
    folders = {".".join(path.relative_to(ROOT).parts[:2]) for path in MODULES if len(path.relative_to(ROOT).parts) > 2}
    assert folders == set(ROOMS) - set(PACKAGES)


def test_no_rooms_import_each_other() -> None:
    """Check that the table has no cycle."""
    pending, order = {room: set(below.split()) for room, below in ROOMS.items()}, []
    while pending:
        free = [room for room, below in pending.items() if not below & pending.keys()]
        assert free, f"a cycle among {sorted(pending)}"
        order += free
        pending = {room: below for room, below in pending.items() if room not in free}


def test_no_modules_import_each_other() -> None:
    arrows = {module_of(path): ours(path) - {module_of(path)} for path in MODULES}
    while free := [module for module, below in arrows.items() if not below & arrows.keys()]:
        arrows = {module: below for module, below in arrows.items() if module not in free}
    assert not arrows, f"a cycle among {sorted(arrows)}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.relative_to(ROOT).parts[0] == "flows"], ids=name_of)
def test_flows_orchestrates_and_cannot_compute(path: Path) -> None:
    allowed = FOREIGN["flows"] | set(PACKAGES) | (ENGINES if path.name in {"engines.py", "cluster.py"} else set())
    allowed |= DICOM if "node" in path.parts else set()
    foreign = tops(path) - allowed - sys.stdlib_module_names
    assert not foreign, f"flows imports {sorted(foreign)}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.relative_to(ROOT).parts[0] != "flows"], ids=name_of)
def test_methods_do_not_know_what_orchestrates_them(path: Path) -> None:
    assert not tops(path) & NEVER


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_imports_are_absolute(path: Path) -> None:
    assert all(level == 0 for _, level in imports(path))


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.name == "__init__.py" and name_of(p) not in DOORS], ids=name_of
)
def test_init_holds_a_docstring_alone(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    assert isinstance(body[0].value.value, str)


def test_a_package_loads_nothing_until_its_door_is_used() -> None:
    """Check that `medad` and `zsad` load nothing heavy, because every command imports `medad.base`."""
    script = "import sys; before = set(sys.modules); import medad, zsad; print(*sorted(set(sys.modules) - before))"
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
    loaded = {name.split(".", maxsplit=1)[0] for name in ran.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"medad", "zsad"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    names = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "helpers", "misc"}
