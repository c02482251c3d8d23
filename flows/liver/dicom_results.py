"""DICOM results of segmented cases: they go back to the archive, so they have the patient's identifiers.

They are written into run folders only, and never into the cache.
"""

from __future__ import annotations

from pathlib import Path

from flows.machine.terminal import terminal
from flows.runs.runner import Runner, to_case_failure
from flows.store.references import Ref
from medad.base.errors import InputError
from medad.cohort.datasets import Case
from medad.steps.results import CaseResult

FOLDER = "dicom"
STAGE = "dicom"


def write_case(runner: Runner, case: Case, result: CaseResult[Ref], out: Path, preview: Path | None = None) -> None:
    """Write a case's DICOM results into the folder `out`. A failure is recorded, and leaves no folder.

    A scan that is not DICOM has none: they need a study of an archive.
    """
    from medad.ct.dicom_choice import is_series
    from medad.dicom_out.results import write_dicom_results

    if not is_series(case.scan):
        terminal.line(f"{case.id}: no DICOM results, because the scan is not DICOM and has no study")
        return
    assert result.segmented is not None, "a finished case is segmented"
    out.mkdir(parents=True)
    folder = result.segmented.folder()
    try:
        write_dicom_results(case.scan, folder, out, liver=case.label, liver_labels=case.liver_labels, preview=preview)
    except InputError as error:
        out.rmdir()
        runner.record_failure(to_case_failure(case.id, STAGE, error))
