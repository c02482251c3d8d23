"""Reading of a case's files with the settings of its data set."""

from __future__ import annotations

from medad.base.errors import InputError
from medad.cohort.datasets import LabelledScan
from medad.ct.io import Geometry, Labels, Volume, read_labels_on, read_scan


def read_case_scan(case: LabelledScan) -> Volume:
    """Read the scan of a case. Raises InputError."""
    return read_scan(case.scan, affine_from=case.affine_from, spacing_mm=case.spacing_mm)


def read_case_labels(case: LabelledScan, scan: Geometry) -> tuple[Labels, list[str]]:
    """Read the label of a case on the scan's grid. Return it and warnings. Raises InputError."""
    if case.label is None:
        raise InputError(case.scan, "no liver label next to this scan")
    labels, warning = read_labels_on(
        scan,
        case.label,
        affine_from=case.affine_from,
        affine_mismatch=case.affine_mismatch,
        spacing_mm=case.spacing_mm,
        liver_labels=case.liver_labels,
    )
    return labels, [*labels.notes, *([warning] if warning else [])]
