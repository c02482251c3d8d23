"""LEAF: text for people: natural order of names, messages on one line, no paths. zsad uses it too."""

from __future__ import annotations

import re
from collections.abc import Sequence

PLACEHOLDER = "(private path)"
"""Text that is shown instead of a path. It is also a regular expression with one group, because it may replace one."""
_PATH = re.compile(
    r"(https?://[^\s'\",;()<>/]+/)[^\s'\",;:()<>]*"  # the name of a server is shown, the rest of an address is not
    r"|(?<![\w.])(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\s'\",;:()<>]*[/\\][^\s'\",;:()<>]*"
)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts tile-2 before tile-10, and numbers before other text."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def list_names(names: Sequence[str], shown: int = 3) -> str:
    """Return names with commas: at most `shown` of them and the number of the others."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def escape_bad_bytes(name: str) -> str:
    """Return a file's name as valid text. Bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def hide_paths(text: str) -> str:
    """Return a text on one line without absolute paths. Callers should not pass paths; this is a second safeguard."""
    return _PATH.sub(lambda found: f"{found[1] or ''}{PLACEHOLDER}", " ".join(escape_bad_bytes(text).split()))
