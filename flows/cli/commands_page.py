"""The page of all commands, docs/reference/commands.md, made from the command line itself.

python -m flows.cli.commands_page > docs/reference/commands.md
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import typer

from flows.cli.app import app

HEAD = """# Commands

All commands with their arguments and options. `adflows COMMAND --help` prints the same.
A value in `[default: ...]` is used if the option is left out. An option marked *repeatable* may be given several times.
[Exit codes](exit-codes.md), [environment variables](environment.md) and [settings](settings.md) have their own pages.

<!-- python -m flows.cli.commands_page > docs/reference/commands.md -->
"""


def commands() -> dict[str, Any]:
    """Return all commands of the command line by their full names, groups excluded."""
    return {name: command for name, command in _tree() if not hasattr(command, "commands")}


def commands_page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD]
    for name, command in _tree():
        text = inspect.cleandoc(command.help or "")
        if hasattr(command, "commands"):
            parts.append(f"## adflows {name}\n\n{text}\n")
            continue
        level = "##" if " " not in name else "###"
        context = typer.Context(command, info_name=f"adflows {name}")
        usage = command.get_usage(context).removeprefix("Usage: ")
        parts.append(f"{level} adflows {name}\n\n{text}\n\n```text\n{' '.join(usage.split())}\n```\n")
        parts.append("\n".join(_table(command, context)) + "\n")
        parts.append(f"```text\n{inspect.cleandoc(command.epilog or '').replace(chr(8), '').strip()}\n```\n")
    return "\n".join(parts)


def _tree() -> Iterator[tuple[str, Any]]:
    """Yield single commands first, then each group and its commands."""
    top = typer.main.get_command(app)
    groups = []
    for name, command in top.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            groups.append((name, command))
        else:
            yield name, command
    for group, command in groups:
        yield group, command
        yield from ((f"{group} {name}", inner) for name, inner in command.commands.items())


def _table(command: Any, context: typer.Context) -> Iterator[str]:
    yield "| argument or option | description |\n|---|---|"
    for parameter in command.params:
        if (record := parameter.get_help_record(context)) is None:
            continue
        left, right = (" ".join(text.split()) for text in record)
        right = re.sub(r"\[(default: [^\]]*|required|x[<>=0-9]+|[0-9]+<=x<=[0-9]+)\]", r"*\\[\1\\]*", right)
        repeatable = " *Repeatable.*" * (bool(getattr(parameter, "multiple", False)) and "epeatable" not in right)
        cells = f"`{left}`", f"{right}{repeatable}"
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.stdout.write(commands_page())
