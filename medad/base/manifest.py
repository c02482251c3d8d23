"""The manifest of a run folder: the inputs and the outputs of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medad.base.errors import ConfigError

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "adflows run 1"


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder holds the results of a run."""
    try:
        return bool(read_manifest(folder).get("schema") == MANIFEST_SCHEMA)
    except ConfigError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run folder. Raises ConfigError if the folder is not a run folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: not a run folder (no readable {MANIFEST})") from error
    if not isinstance(manifest, dict):
        raise ConfigError(f"{folder}: not a run folder (no readable {MANIFEST})")
    return manifest
