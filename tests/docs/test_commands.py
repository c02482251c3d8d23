"""Commands in documents exist with their options, and every command and option is in a document."""

from __future__ import annotations

import functools
from typing import Any

from flows.cli.commands_page import commands, commands_page
from tests.docs.pages import DOCS, documented_commands
from tests.prose import ROOT, markdown_files

PAGE = DOCS / "reference" / "commands.md"
GENERATED = {PAGE, DOCS / "reference" / "settings.md", DOCS / "reference" / "metrics.md"}
HISTORY = {"CHANGELOG.md"}
"""Documents that name commands of earlier releases."""


tree_of_commands = functools.cache(commands)


def options(command: Any) -> dict[str, bool]:
    """Return the options of a command, and whether each takes a value."""
    found = {"--help": False}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            takes_value = not parameter.is_flag
            found |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], takes_value)
    return found


def mistake(words: list[str]) -> str | None:
    """Return what is wrong with the words after `adflows`; None: nothing."""
    tree = tree_of_commands()
    groups = {name.split()[0] for name in tree if " " in name}
    words = [word.strip("[]") for word in words if word not in ("...", "…")]
    if not words or words[0] in ("COMMAND", "--help"):
        return None
    if words[0] in groups and (len(words) == 1 or words[1] == "--help"):
        return None
    depth = 1 + (words[0] in groups)
    name = " ".join(words[:depth])
    if name not in tree:
        return f"no command `{name}`"
    known, rest = options(tree[name]), iter(words[depth:])
    for word in rest:
        option, equals, _ = word.partition("=")
        if not option.startswith("-") or option == "-":
            continue
        if option not in known:
            return f"`{name}` has no option {option}"
        if known[option] and not equals:
            next(rest, None)
    return None


def test_commands_in_documents_exist_with_their_options() -> None:
    found = [
        f"{place}: {problem}"
        for place, words in documented_commands()
        if place.split(":")[0] not in HISTORY and (problem := mistake(words))
    ]
    assert not found, "\n".join(found)


def test_mistakes_are_seen() -> None:
    assert mistake(["liver", "rum", "small"]) == "no command `liver rum`"
    assert mistake(["liver", "run", "small", "--trian", "x"]) == "`liver run` has no option --trian"
    assert mistake(["liver", "run", "small", "--train=x", "--set", "--odd", "--json"]) is None


def test_every_command_is_in_a_page_written_by_hand() -> None:
    said = [words for place, words in documented_commands() if ROOT / place.split(":")[0] not in GENERATED]
    missing = [
        name for name in tree_of_commands() if not any(words[: len(name.split())] == name.split() for words in said)
    ]
    assert not missing


def test_every_option_is_in_a_document() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in markdown_files())
    missing = [
        f"{name} {option}"
        for name, command in tree_of_commands().items()
        for option in options(command)
        if option.startswith("--") and option not in text
    ]
    assert not missing


def test_the_page_of_commands_is_what_the_command_line_says() -> None:
    hint = "python -m flows.cli.commands_page > docs/reference/commands.md"
    assert PAGE.read_text(encoding="utf-8") == commands_page(), hint


def test_the_page_of_metrics_is_what_reports_say() -> None:
    from tests.docs.metrics_page import metrics_page

    page = DOCS / "reference" / "metrics.md"
    hint = "python -m tests.docs.metrics_page > docs/reference/metrics.md"
    assert page.read_text(encoding="utf-8") == metrics_page(), hint
