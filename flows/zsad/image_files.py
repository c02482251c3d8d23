"""Digests of masks, and the optional library that decodes HEIC, for the keys of steps."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from flows.store.digests import path_digest
from flows.store.references import canonical_json

HEIC_LIBRARIES = ("pillow-heif",) * bool(importlib.util.find_spec("pillow_heif"))
"""Names of the installed optional libraries that decode images."""


def mask_digest(mask: Path) -> str:
    """Return the digest of a mask: of its file, or of all masks in its folder. Raises InputError."""
    from zsad.data.masks import mask_files

    if not mask.is_dir():
        return path_digest(mask)
    return hashlib.sha256(canonical_json([path_digest(file) for file in mask_files(mask)]).encode()).hexdigest()
