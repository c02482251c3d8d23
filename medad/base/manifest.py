"""The manifest of a run folder: what went into a run, and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medad.base.errors import ConfigError

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a run folder's manifest. Raises ConfigError where the folder is not a run's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: not the folder of a run (no readable {MANIFEST})") from error
    if not isinstance(manifest, dict):
        raise ConfigError(f"{folder}: not the folder of a run (no readable {MANIFEST})")
    return manifest
