"""The digest of a step's code: the edits that must change it, and those that must not."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.liver.steps import EVALUATE, PREPARE, SEGMENT
from flows.liver.training_steps import RESTORATION, SEGMENTATION
from flows.store import code as sources
from flows.store.step import Step
from tests.flows.store.test_step import DECLARED

Write = Callable[[dict[str, str]], str]

PACKAGE = {
    "__init__": "",
    "entry": (
        "from {package}.middle import halve\n"
        "from {package} import tables\n"
        "def start(x: int) -> int:\n"
        "    '''Doc.'''\n"
        "    return halve(x) + tables.OFFSET\n"
        "def unrelated():\n"
        "    return 1\n"
    ),
    "middle": (
        "from {package}.deep import Deep as Renamed\n"
        "def halve(x):\n"
        "    return Renamed().value() // 2\n"
        "def other():\n"
        "    return 2\n"
    ),
    "deep": (
        "LIMIT = 3\n"
        "class Base:\n"
        "    def value(self):\n"
        "        import {package}.lazy\n"
        "        return {package}.lazy.ANSWER + LIMIT\n"
        "class Deep(Base):\n"
        "    pass\n"
    ),
    "lazy": "ANSWER = 42\nUNUSED = 1\n",
    "tables": "OFFSET = 5\n",
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Return a function that writes a new package and returns the digest of its `entry:start`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    numbers = itertools.count()
    loaded = set(sys.modules)

    def digest(changes: dict[str, str]) -> str:
        # always the same name, since the digest contains module names
        folder = tmp_path / "walked"
        folder.mkdir(exist_ok=True)
        for name, text in (PACKAGE | changes).items():
            (folder / f"{name}.py").write_text(text.replace("{package}", "walked"), encoding="utf-8")
        next(numbers)
        monkeypatch.setattr(sources, "PACKAGES", ("walked",))
        sources._parse.cache_clear()
        sources.closure.cache_clear()
        return sources.code_digest("walked.entry:start")

    yield digest
    sources._parse.cache_clear()
    sources.closure.cache_clear()
    assert not {name for name in set(sys.modules) - loaded if name.startswith("walked.")}, (
        "the digest imports no module"
    )


def edit(module: str, old: str, new: str) -> dict[str, str]:
    assert old in PACKAGE[module]
    return {module: PACKAGE[module].replace(old, new)}


@pytest.mark.parametrize(
    "change",
    [
        edit("entry", "halve(x) +", "halve(x) -"),
        edit("middle", "// 2", "// 3"),
        edit("deep", "LIMIT = 3", "LIMIT = 4"),
        edit("lazy", "ANSWER = 42", "ANSWER = 43"),
        edit("tables", "OFFSET = 5", "OFFSET = 6"),
        edit("deep", "class Deep(Base):\n    pass", "class Deep(Base):\n    def value(self):\n        return 0"),
        edit("deep", "LIMIT = 3", "LIMIT = 3\nif LIMIT:\n    LIMIT = 4"),
        edit("entry", "def start(x: int)", "def start(x: int = 7)"),
    ],
)
def test_code_that_runs_changes_the_digest(write: Write, change: dict[str, str]) -> None:
    assert write({}) != write(change)


@pytest.mark.parametrize(
    "change",
    [
        edit("entry", "'''Doc.'''", "'''Another text.'''"),
        edit("entry", "'''Doc.'''\n", "# a comment\n"),
        edit("entry", "x: int", "x: 'float'"),
        edit("entry", "-> int", "-> object"),
        edit("entry", "return 1", "return 100"),
        edit("middle", "return 2", "return 200"),
        edit("lazy", "UNUSED = 1", "UNUSED = 2"),
        edit("lazy", "ANSWER = 42", "ANSWER = (\n    42\n)"),
    ],
)
def test_what_does_not_run_does_not(write: Write, change: dict[str, str]) -> None:
    assert write({}) == write(change)


def test_a_name_that_is_not_there_is_an_error_and_no_constant_key() -> None:
    with pytest.raises(LookupError):
        sources.closure("medad.base.errors:nothing_of_this_name")
    with pytest.raises(LookupError):
        sources.closure("medad.nothing:start")


@pytest.mark.parametrize("step", DECLARED, ids=lambda step: step.name)
def test_every_step_names_a_function_that_exists(step: Step) -> None:
    assert len(sources.closure(step.function)) > 1


def test_a_functions_own_module_counts_wherever_it_lies() -> None:
    fake = sources.closure("tests.flows.fake_steps:write_text")
    assert {"tests.flows.fake_steps:write_text", "tests.flows.fake_steps:RUNS"} <= set(fake)
    assert "tests.flows.fake_steps:fake" not in fake


def reached(step: Step) -> set[str]:
    return set(sources.closure(step.function))


def test_a_step_reaches_what_it_calls_and_not_what_others_call() -> None:
    assert {"medad.slices.preprocess:window", "medad.slices.preprocess:equalise", "medad.ct.io:read_scan"} <= reached(
        PREPARE
    )
    assert {
        "medad.anomalies.synthesis:synthesise",
        "medad.base.noise:blob_masks",
        "medad.networks.nets:build",
    } <= reached(RESTORATION)
    assert {"medad.networks.infer:predict", "medad.evaluation.postprocess:postprocess"} <= reached(SEGMENT)
    assert "medad.evaluation.metrics:evaluate" in reached(EVALUATE)

    def modules(step: Step) -> set[str]:
        return {name.partition(":")[0] for name in reached(step)}

    # an edit of the report or of a metric must not repeat a training
    for step in (PREPARE, RESTORATION, SEGMENTATION, SEGMENT):
        assert not modules(step) & {
            "medad.reports.run.report",
            "medad.reports.run.document",
            "medad.reports.pictures",
            "medad.evaluation.metrics",
        }
    assert "medad.networks.train" not in modules(PREPARE)
    assert "medad.evaluation.postprocess" not in modules(SEGMENTATION)


def test_a_parser_that_another_thread_disturbs_is_asked_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = write({})
    real, calls = ast.parse, itertools.count()

    def disturbed(source: str) -> object:
        if next(calls) % 3:
            raise SystemError("AST constructor recursion depth mismatch")
        return real(source)

    monkeypatch.setattr(ast, "parse", disturbed)
    assert write({}) == wanted
