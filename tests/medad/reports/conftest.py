"""Fixture that writes a liver report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from medad.base.errors import CaseFailure
from medad.reports.run.report import write_report
from medad.steps.results import CaseResult
from tests.medad.report_cases import Report, liver_settings
from tests.page import WrittenReport


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Return the function that writes a report into a new folder of the test."""

    def write(
        results: Sequence[CaseResult[Path]] = (), failures: Sequence[CaseFailure] = (), **changes: Any
    ) -> WrittenReport:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        out.mkdir()
        arguments: dict[str, Any] = {"settings": liver_settings(), "restoration": None, "segmentation": None}
        arguments |= {"versions": {"adflows": "0.1.0"}, "notes": []}
        write_report(out, results=results, failures=failures, **(arguments | changes))
        return WrittenReport(out)

    return write
