"""Fixture of a test case, for the tests of keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from medad.cohort.datasets import Case


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Return a case of two files. They are not scans, because a key depends only on their bytes."""
    scan, label = tmp_path / "volume-1.nii.gz", tmp_path / "segmentation-1.nii.gz"
    scan.write_bytes(b"scan")
    label.write_bytes(b"label")
    return Case("lits-1", scan, label, (1, 2), 2)
