"""LEAF: names and sentences as people read them: natural order, one line, no paths. Also used by `zsad`."""

from __future__ import annotations

import re

PLACEHOLDER = "(private path)"
"""Shown in place of a path. A regular expression with one group, as it may stand in place of one."""
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\s'\",;:()<>]*[/\\][^\s'\",;:()<>]*")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts tile-2 before tile-10, and numbers before other text."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def escape_bad_bytes(name: str) -> str:
    """A file's name as text that any file can hold: bytes that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def hide_paths(text: str) -> str:
    """One line without absolute paths; callers leave paths out already, this is the net below them."""
    return _PATH.sub(PLACEHOLDER, " ".join(escape_bad_bytes(text).split()))
