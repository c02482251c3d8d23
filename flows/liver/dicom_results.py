"""DICOM results of segmented cases: they go back to the archive, so they have the patient's identifiers.

They are written into run folders only, and never into the cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from flows.machine.terminal import terminal
from flows.runs.runner import Runner, to_case_failure
from flows.store.references import Ref
from medad.base.errors import InputError
from medad.cohort.datasets import Case
from medad.config.liver import DatasetSettings
from medad.steps.results import CaseResult

FOLDER = "dicom"
STAGE = "dicom"


def write_case(
    runner: Runner, case: Case, result: CaseResult[Ref], data: DatasetSettings, out: Path, preview: Path | None = None
) -> str:
    """Write a case's DICOM results into the folder `out`. Return why there are none, or an empty text.

    A failure is recorded, and leaves no folder. A scan that is not DICOM has no results: they need a study of an
    archive. `data` has the settings with which the case was read.
    """
    from medad.ct.dicom_choice import is_series
    from medad.dicom_out.results import write_dicom_results

    if not is_series(case.scan):
        rule = "no DICOM results, because the scan is not DICOM and has no study"
        terminal.line(f"{case.id}: {rule}")
        return rule
    assert result.segmented is not None, "a finished case is segmented"
    out.mkdir(parents=True)
    try:
        write_dicom_results(
            case.scan,
            result.segmented.folder(),
            out,
            liver=case.label,
            liver_labels=case.liver_labels,
            preview=preview,
            affine_from=data.affine_from,
            affine_mismatch=data.affine_mismatch,
            spacing_mm=data.spacing_mm,
            say=lambda line: terminal.line(f"{case.id}: {line}"),
        )
    except InputError as error:
        shutil.rmtree(out)
        failure = to_case_failure(case.id, STAGE, error)
        runner.record_failure(failure)
        return f"no DICOM results: {failure.rule}"
    return ""
