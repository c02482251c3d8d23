"""Images known by their content, with what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LabelledImage:
    """One image of a category."""

    id: str
    """Shown; unique in its category."""
    sha256: str
    """Digest of the file's bytes; features and scores name the image by it."""
    path: Path = field(repr=False)
    """File, never shown."""
    anomalous: bool | None = None
    """None without a label."""
    defect: str = ""
    """Kind of defect, or empty."""
    mask: Path | None = field(default=None, repr=False)
