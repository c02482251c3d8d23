"""Writing of a case's page: the scan, its overlays and the table of lesions in one file that needs no network."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from medad.base.errors import InputError
from medad.base.storage import read_json, write_bytes
from medad.cohort.datasets import LabelledScan
from medad.ct.checks import require_liver
from medad.ct.io import read_labels_on, read_scan
from medad.reporting.page import jpeg_uri, page_environment, script_of
from medad.reports.run.shown_slices import picture_rows
from medad.reports.viewer.volume import BYTE_KNOTS, HU_KNOTS, MOST_VOXELS, ShownVolume, shown_volume
from medad.steps.cases import read_truth
from medad.steps.read_case import read_case_labels, read_case_scan
from medad.steps.results import PAGE_FILE, CaseResult

FILES = (("masks", ".nii.gz"), ("probabilities", ".nii.gz"), ("lesions", ".json"))
"""Folder and ending of each file of a case in a run folder."""
PRINTED_PX, PRINTED_QUALITY = 224, 85
"""Side of a panel in the printed pictures, and their JPEG quality."""
MOST_BYTES, LEAST_VOXELS = 15_000_000, 100_000
"""Largest size of a page. Below the second number the table of lesions takes the space."""
WINDOWS = {"Liver": (-20, 180), "Soft tissue": (-160, 240), "Lung": (-1000, 400), "Bone": (-500, 1300)}
"""Windows to choose from, in HU."""


@dataclass(frozen=True)
class PrintedPicture:
    """A picture of the case for paper, as a data URI."""

    caption: str
    uri: str


@dataclass(frozen=True)
class SegmentedFiles:
    """The files of a segmented case, on the scan's own grid."""

    mask: Path
    probability: Path
    lesions: Path

    @classmethod
    def of_run(cls, run: Path, name: str) -> SegmentedFiles:
        """Return the files of a case in a run folder. Raises InputError if one is missing."""
        files = cls(*(run / folder / f"{name}{ending}" for folder, ending in FILES))
        for file in (files.mask, files.probability, files.lesions):
            if not file.is_file():
                raise InputError(file, "no such file; is it a case of this run?")
        return files


def write_result_page(out: Path, *, case: LabelledScan, result: CaseResult[Path]) -> None:
    """Write the page of a finished case, `case.html`, into an existing folder.

    A run publishes it in its folder `cases`, so the page links to the report one folder above. On paper it shows the
    report's pictures of the case. Raises as `write_case_page`.
    """
    assert result.segmented is not None, "a finished case is segmented"
    names = ("mask.nii.gz", "probability.nii.gz", "lesions.json")
    printed = [
        PrintedPicture(row.caption, jpeg_uri(row.picture, PRINTED_QUALITY)) for row in picture_rows(result, PRINTED_PX)
    ]
    files = SegmentedFiles(*(result.segmented / name for name in names))
    write_case_page(case, result.case_id, files, out / PAGE_FILE, back="../report.html", printed=printed)


def write_case_page(
    case: LabelledScan,
    case_id: str,
    files: SegmentedFiles,
    page: Path,
    *,
    back: str,
    printed: Sequence[PrintedPicture] = (),
) -> None:
    """Write the page of a segmented case.

    Parameters
    ----------
    case
        The scan, its liver mask if there is one, and with a tumour label its ground truth.
    case_id
        Name of the case in the page.
    back
        Relative address of the run's report.
    printed
        Pictures for paper. Without them the three planes are printed as they are shown.

    Raises
    ------
    InputError
        A file cannot be read, or is on another grid than the scan.
    DiskFullError
        The disk is full. An earlier page is unchanged.
    """
    volume = read_case_scan(case)
    geometry = volume.geometry
    prediction = read_labels_on(geometry, files.mask)[0].values.astype(bool)
    scores = read_scan(files.probability)
    if scores.hu.shape != volume.hu.shape:
        raise InputError(files.probability, "it has another grid than the scan")
    truth: ndarray | None = None
    liver: ndarray = scores.hu > 0
    if case.label is not None and case.tumour_label is not None:
        truth, liver = read_truth(case, geometry, "no tumour label")
    elif case.label is not None:
        liver = require_liver(read_case_labels(case, geometry)[0], case.liver_labels, case.label)
    table, most = read_json(files.lesions), MOST_VOXELS
    while True:
        shown = shown_volume(
            volume.hu, liver, prediction, truth, scores.hu, geometry.canonical_spacing_mm, most_voxels=most
        )
        text = render_case(case_id, shown, table["lesions"], back, printed).encode()
        if len(text) <= MOST_BYTES or most < LEAST_VOXELS:
            break
        most = int(0.9 * most * MOST_BYTES / len(text))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(page, text)


def render_case(
    case_id: str,
    shown: ShownVolume,
    lesions: Sequence[Mapping[str, Any]],
    back: str,
    printed: Sequence[PrintedPicture] = (),
) -> str:
    """Return the page as text. `lesions` are the rows of the lesion table."""
    places = _places(shown.lesions, len(lesions))
    predicted = shown.lesions > 0
    differs = np.zeros(predicted.shape[2], bool) if shown.truth is None else (predicted ^ shown.truth).any((0, 1))
    flags = shown.liver.astype(np.uint8)
    if shown.truth is not None:
        flags |= shown.truth.astype(np.uint8) << 1
    meta = {
        "shape": list(shown.grey.shape),
        "spacing_mm": list(shown.spacing_mm),
        "first": shown.first_plane,
        "knots": [list(HU_KNOTS), list(BYTE_KNOTS)],
        "windows": {name: list(window) for name, window in WINDOWS.items()},
        "places": places,
        "truth": shown.truth is not None,
        "marks": {
            "prediction": np.flatnonzero(predicted.any((0, 1))).tolist(),
            "differs": np.flatnonzero(differs).tolist(),
        },
        "start": places[0] if places and places[0] else _middle(shown.liver),
    }
    arrays = {"grey": shown.grey, "flags": flags, "lesions": shown.lesions, "probability": shown.probability}
    environment = page_environment("medad.reports.viewer")
    rows = [SimpleNamespace(place=place, **row) for place, row in zip(places, lesions, strict=True)]
    script, digest = script_of("medad.reports.viewer", "viewer.js")
    doc = SimpleNamespace(
        name=case_id, notes=(), lesions=rows, truth=meta["truth"], windows=WINDOWS, back=back, printed=printed
    )
    return environment.get_template("case.html").render(
        doc=doc,
        meta=json.dumps(meta),
        data={name: _packed(values) for name, values in arrays.items()},
        viewer=script,
        more_scripts=digest,
    )


def _packed(values: ndarray) -> str:
    """Return an array as base64 of gzip, x fastest."""
    content = np.asfortranarray(values).tobytes(order="F")
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


def _places(numbers: ndarray, count: int) -> list[list[int] | None]:
    """Return a voxel of each lesion, the one nearest to its centre. None: no shown voxel belongs to it."""
    places: list[list[int] | None] = []
    for number in range(1, count + 1):
        voxels = np.argwhere(numbers == min(number, 255))
        if not len(voxels):
            places.append(None)
            continue
        nearest = np.abs(voxels - voxels.mean(0)).sum(1).argmin()
        places.append([int(index) for index in voxels[nearest]])
    return places


def _middle(mask: Bool[ndarray, "X Y Z"]) -> list[int]:
    voxels = np.argwhere(mask)
    centre = voxels.mean(0) if len(voxels) else np.array(mask.shape) / 2
    return [min(int(index), size - 1) for index, size in zip(centre, mask.shape, strict=True)]
