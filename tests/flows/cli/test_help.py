"""The help of every command: complete summaries, a description, examples that parse, and help for each option."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer.main

from flows.cli.app import app

Cli = Callable[..., Any]
COLUMNS = 80
PROGRAM = "adflows"


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a command and all its sub-commands, each with the words that call it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


ALL = dict(walk(typer.main.get_command(app)))
GROUPS = [path for path, command in ALL.items() if hasattr(command, "commands")]
LEAVES = [path for path, command in ALL.items() if not hasattr(command, "commands")]


@pytest.fixture(autouse=True)
def _terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def examples(text: str) -> list[str]:
    """Return the command lines of a help text."""
    return [line.strip() for line in text.splitlines() if line.strip().startswith(f"{PROGRAM} ")]


def test_all_commands_are_found() -> None:
    assert {(), ("liver",), ("zsad",), ("cache",), ("ids",)} <= set(GROUPS)
    assert {("demo",), ("liver", "segment"), ("zsad", "compare"), ("cache", "prune"), ("ids", "add")} <= set(LEAVES)


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_no_summary_is_cut(cli: Cli, group: tuple[str, ...]) -> None:
    """A listing shows each command's whole summary on one line."""
    listing = cli(*group, "--help").out.partition("Commands:")[2].partition("Example")[0].splitlines()
    rows = {line.split()[0]: line for line in listing if line.strip()}
    assert set(rows) == set(ALL[group].commands)
    for name, row in rows.items():
        assert row.endswith("."), row
        assert "..." not in row, row
        assert len(row) <= COLUMNS, row
        assert len(row.split()) > 2, f"{name} has no summary"


@pytest.mark.parametrize("path", list(ALL), ids=" ".join)
def test_a_description_follows_the_summary(path: tuple[str, ...]) -> None:
    summary, _, description = (ALL[path].help or "").partition("\n\n")
    assert "\n" not in summary.strip()
    assert len(description.split()) > 5


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_an_example_that_parses(cli: Cli, path: tuple[str, ...]) -> None:
    start = " ".join((PROGRAM, *path))
    found = [line for line in examples(cli(*path, "--help").out) if line.startswith(start)]
    assert found, f"no line begins with {start}"
    for line in found:
        words = shlex.split(line)[1 + len(path) :]
        ALL[path].make_context(start, words)  # exits if an option or argument is unknown, missing or malformed


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_every_group_has_examples_that_parse(cli: Cli, group: tuple[str, ...]) -> None:
    found = examples(cli(*group, "--help").out)
    assert found
    for line in found:
        words = tuple(shlex.split(line)[1:])
        [path] = [leaf for leaf in LEAVES if words[: len(leaf)] == leaf]
        assert path[: len(group)] == group
        ALL[path].make_context(line, list(words[len(path) :]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("adflows li", {"liver"}),
        ("adflows liver seg", {"segment"}),
        ("adflows liver run de", {"default", "demo", "demo_train"}),
        ("adflows liver inbox ", {"example"}),
        ("adflows zsad run wincl", {"winclip"}),
        ("adflows zsad score photos --sav", {"--save-threshold"}),
    ],
)
def test_the_shell_completes_commands_options_and_names(words: str, expected: set[str]) -> None:
    program = "import sys; sys.argv = ['adflows']; from flows.__main__ import main; main()"
    wanted = {"_ADFLOWS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | wanted, capture_output=True, encoding="utf-8", check=False
    )
    assert set(done.stdout.split()) == expected, done.stderr


def test_the_program_writes_its_completion_script() -> None:
    program = "import sys; sys.argv = ['adflows']; from flows.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"_ADFLOWS_COMPLETE": "source_bash"}, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert "complete -o default -F _adflows_completion adflows" in done.stdout


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_option_and_argument_has_help(path: tuple[str, ...]) -> None:
    for parameter in ALL[path].params:
        text = getattr(parameter, "help", None) or ""
        assert text.endswith("."), f"{parameter.name}: {text}"
