"""Names of the files of anomaly maps, from the names of categories and the ids of images."""

from __future__ import annotations

import hashlib
import re

MAPS = "maps"
"""Folder of the maps in a run folder."""
_LONGEST_NAME_BYTES = 200
"""Longest name of a file without its suffix. Most file systems allow 255 bytes."""


def file_parts(image_id: str) -> list[str]:
    """Return the folders and the name of an image's map, without its suffix.

    Names that are too long for a file system are cut and get a digest.
    """
    return [_short(part) for part in image_id.split("/")]


def folder_name(category: str) -> str:
    """Return the name of a category's folder of maps: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^\w.-]+", "_", category).strip("._") or "_"


def _short(name: str) -> str:
    encoded = name.encode()
    if len(encoded) <= _LONGEST_NAME_BYTES:
        return name
    kept = encoded[: _LONGEST_NAME_BYTES - 9].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(encoded).hexdigest()[:8]}"
