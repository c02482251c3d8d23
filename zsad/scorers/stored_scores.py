"""Scores on disk, of any system."""

from __future__ import annotations

from pathlib import Path

from zsad.scorers.dual.scores_file import Scores
from zsad.scorers.scores_file import INDEX_FILE, SystemScores

StoredScores = Scores | SystemScores
"""Scores of one category with one seed. Both classes have the same properties and methods."""


def open_scores(folder: Path) -> StoredScores:
    """Open the scores in a folder, of the dual-image scorer or of any other system. Raise InputError."""
    return SystemScores(folder) if (folder / INDEX_FILE).exists() else Scores(folder)
