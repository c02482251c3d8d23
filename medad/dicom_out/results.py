"""Writing of a segmented case's DICOM results, which go back to the archive of its scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool
from pydicom import Dataset

from medad.base.errors import InputError
from medad.base.storage import atomic_path, read_json
from medad.ct.checks import fill_cavities, require_liver
from medad.ct.io import AffineFrom, Spacing, read_labels_on
from medad.dicom_out.objects import MOST_LESIONS, make_document, make_report, make_segmentation, segments_of
from medad.dicom_out.page import draw_page
from medad.dicom_out.source import source_series
from medad.evaluation.postprocess import label_lesions

SEG, SR, DOCUMENT = "seg.dcm", "sr.dcm", "report.dcm"


def write_dicom_results(
    scan: Path,
    case_folder: Path,
    out: Path,
    *,
    liver: Path | None = None,
    liver_labels: Sequence[int] = (1,),
    preview: Path | None = None,
    made: datetime | None = None,
    affine_from: AffineFrom = "agree",
    affine_mismatch: Literal["error", "warn"] = "error",
    spacing_mm: Spacing | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write seg.dcm, sr.dcm and report.dcm of a segmented DICOM series, and return their paths.

    Patient and study are those of the source. UIDs follow from the content, so equal results have equal UIDs.

    Parameters
    ----------
    scan
        The DICOM series. Another file type has no study, and an InputError says so.
    case_folder
        Folder with mask.nii.gz and lesions.json.
    out
        Existing folder.
    liver, liver_labels
        Liver mask on the scan's grid and its values of liver. None: liver_masks/*.nii.gz of the case folder, if it has
        exactly one.
    preview
        Picture of this case alone, for the document. None: preview.png of the case folder, if it has one.
    made
        Date and time of the results. They are the only part that differs between two runs. None: now.
    affine_from, affine_mismatch, spacing_mm
        Reading of the liver mask, as the scan was segmented.
    say
        Receiver of a line about attributes that are empty in the results, because their values are not allowed.

    Raises
    ------
    InputError
        The scan is not DICOM, a file is missing or on another grid, mask and lesion table differ, or a header breaks a
        rule of DICOM. Then no file is left.
    """
    source = source_series(scan)
    if source.emptied:
        say(f"not valid in the scan, and empty in the DICOM results: {', '.join(source.emptied)}")
    geometry, made = source.geometry, made or datetime.now().astimezone()
    table = read_json(case_folder / "lesions.json")
    mask_file = case_folder / "mask.nii.gz"
    mask = read_labels_on(geometry, mask_file)[0].values.astype(bool)
    found = sorted((case_folder / "liver_masks").glob("*.nii.gz"))
    if liver is None and len(found) == 1:
        liver, liver_labels = found[0], (1,)
    labels = np.zeros(mask.shape, np.uint8)
    if liver is not None:
        read, _ = read_labels_on(
            geometry,
            liver,
            affine_from=affine_from,
            affine_mismatch=affine_mismatch,
            spacing_mm=spacing_mm,
            liver_labels=liver_labels,
        )
        labels[fill_cavities(require_liver(read, liver_labels, liver), geometry.voxel_mm3)[0]] = 1
    first = int(liver is not None) + 1
    _mark_lesions(labels, mask, first, len(table["lesions"]), mask_file)
    segments = segments_of(table["lesions"], liver=liver is not None)
    parameters = {"threshold": f"{table['threshold']:.4g}"}
    default = case_folder / "preview.png"
    page = draw_page(table, preview or (default if default.is_file() else None))
    try:
        segmentation = make_segmentation(source, labels, segments, parameters, made) if segments else None
        results: dict[str, Dataset | None] = {
            SEG: segmentation,
            SR: make_report(source, segmentation, segments, table, made),
            DOCUMENT: make_document(source, page, made),
        }
        return [_save(out / name, result) for name, result in results.items() if result is not None]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        for name in (SEG, SR, DOCUMENT):
            (out / name).unlink(missing_ok=True)
        # the text of the error may contain the value
        rule = f"its headers break a rule of DICOM ({type(error).__name__}); DICOM results cannot be made"
        raise InputError(scan, rule) from None


def _mark_lesions(labels: np.ndarray, mask: Bool[np.ndarray, "X Y Z"], first: int, count: int, mask_file: Path) -> None:
    """Write the segment numbers of lesions into `labels`: `first` for the largest one."""
    lesions = label_lesions(mask)
    marked = 0 if lesions is None else int(lesions[1].max())
    if marked != count:
        raise InputError(mask_file, f"the mask has {marked} lesions, but lesions.json lists {count}")
    if lesions is not None:
        box, ids = lesions
        inside = ids > 0
        labels[box][inside] = np.minimum(ids[inside], MOST_LESIONS + 1) + first - 1


def _save(path: Path, result: Dataset) -> Path:
    with atomic_path(path) as temporary:
        result.save_as(temporary, enforce_file_format=True)
    return path
