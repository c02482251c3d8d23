"""Image of a category with its digest, label and mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LabelledImage:
    """One image of a category."""

    id: str
    """Id, unique in its category. Reports show it."""
    sha256: str
    """Digest of the file's bytes, by which features and scores identify the image."""
    path: Path = field(repr=False)
    """File of the image. Its path is never shown."""
    anomalous: bool | None = None
    """Label. None: unknown."""
    defect: str = ""
    """Kind of defect. Empty if unknown."""
    mask: Path | None = field(default=None, repr=False)
    """File of the mask, if there is one."""
