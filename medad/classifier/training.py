"""Training of the voxel classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medad.base.progress import OnProgress
from medad.config.training import ClassifierSettings

CLASSIFIER = "classifier.txt"


def train_classifier(
    prepared: Sequence[Path],
    copies: Sequence[Path],
    settings: ClassifierSettings,
    seed: int,
    out: Path,
    *,
    initial: Path | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Write classifier.txt into `out`."""
    del checkpoint, on_progress
    begun = "" if initial is None else (initial / CLASSIFIER).read_text(encoding="utf-8")
    (out / CLASSIFIER).write_text(f"{begun}{len(prepared)} {len(copies)} {seed} {settings.trees}\n", encoding="utf-8")
