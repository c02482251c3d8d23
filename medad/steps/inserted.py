"""The cached step of an inserted-lesion study: insert, segment, measure. Only the measurements are stored."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from medad.anomalies.insert import Inserted, draw_diameters, insert_sizes
from medad.base.errors import InputError
from medad.base.storage import write_bytes
from medad.cohort.datasets import INSERTED_LIVER, INSERTED_TUMOUR, LabelledScan
from medad.config.sensitivity import InsertionSettings, MeasureSettings
from medad.ct.checks import require_liver
from medad.ct.io import Volume, read_scan, source_digest
from medad.evaluation.sensitivity import VolumeRecord, measure_lesions
from medad.steps.cases import PROBABILITY, prepare_case
from medad.steps.read_case import read_case_labels, read_case_scan
from medad.steps.results import Segmenter
from medad.steps.segment import segment_case

RECORD = "lesions.json"


_PLACE_CODE = {"inside": 0, "rim": 1}


def measure_inserted(
    case: LabelledScan,
    insertion: InsertionSettings,
    measure: MeasureSettings,
    healthy: Path,
    segment: Segmenter[Path],
    out: Path,
    *,
    device: str = "auto",
    largest_batch: int | None = None,
) -> None:
    """Insert lesions into a healthy scan, segment it, and write lesions.json (a `VolumeRecord`) into `out`.

    The scan with lesions is written as an uncompressed file of integer HU, as scanners write them. It is prepared,
    segmented, and removed at the end. Sizes, places and shapes depend on `insertion.seed`, repeat, group, place and the
    scan's content. They do not depend on contrast or kind, so contrasts are compared on the same lesions.

    Parameters
    ----------
    case
        A healthy scan and its label.
    insertion
        Seed, sizes, contrast and place of the lesions.
    measure
        Allowed false-positive volume, overlap and surroundings.
    healthy
        Folder with the same networks' segmentation of the scan without lesions.
    segment
        Settings and networks with which the scan without lesions was prepared and segmented.

    Raises
    ------
    InputError
        A file cannot be used, its label contains tumour, or the allowed false-positive volume exceeds the liver.
    """
    scan, liver = _read_healthy_scan(case, measure)
    spacing_mm = scan.geometry.canonical_spacing_mm
    inserted = _insert_lesions(case, scan.hu, liver, spacing_mm, insertion)
    healthy_probability = read_scan(healthy / PROBABILITY).hu
    inserted_probability = healthy_probability
    if inserted.lesions:
        values = liver.astype(np.uint8) * np.uint8(INSERTED_LIVER)
        values[inserted.number > 0] = INSERTED_TUMOUR
        inserted_probability = _segment_inserted(
            inserted.hu,
            values,
            scan.geometry.canonical_affine,
            segment,
            out,
            device=device,
            largest_batch=largest_batch,
        )
    point, marked_ml, lesions = measure_lesions(
        inserted_probability, healthy_probability, liver, inserted.number, inserted.lesions, spacing_mm, measure
    )
    record = VolumeRecord(
        contrast=insertion.contrast,
        place=insertion.place,
        repeat=insertion.repeat,
        bins_mm=insertion.bins_mm,
        threshold=point.threshold,
        healthy_false_positive_ml=point.marked_ml,
        inserted_false_positive_ml=marked_ml,
        lesions=tuple(lesions),
    )
    write_bytes(out / RECORD, (record.model_dump_json(indent=1) + "\n").encode())


def _read_healthy_scan(case: LabelledScan, measure: MeasureSettings) -> tuple[Volume, Bool[np.ndarray, "X Y Z"]]:
    scan = read_case_scan(case)
    labels, _ = read_case_labels(case, scan.geometry)
    assert case.label is not None
    if case.tumour_label is not None and (labels.values == case.tumour_label).any():
        rule = f"lesions are inserted into healthy livers, but this label contains tumour ({case.tumour_label})"
        raise InputError(case.label, rule)
    liver = require_liver(labels, case.liver_labels, case.label)
    liver_ml = np.count_nonzero(liver) * scan.geometry.voxel_mm3 / 1000
    if liver_ml <= measure.false_positive_ml:
        rule = f"false_positive_ml = {measure.false_positive_ml:g} must be smaller than this liver ({liver_ml:.3g} mL)"
        raise InputError(case.label, rule)
    return scan, liver


def _insert_lesions(
    case: LabelledScan,
    hu: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    insertion: InsertionSettings,
) -> Inserted:
    place = _PLACE_CODE[insertion.place]
    content = int(source_digest(case.scan)[:16], 16)
    rng = np.random.default_rng([insertion.seed, insertion.repeat, insertion.group, place, content])
    diameters = []
    for size in insertion.bins_mm:
        (diameter,) = draw_diameters(insertion.insert_settings(size), 1, rng)
        # the upper edge of a bin belongs to the next bin
        diameters.append(min(diameter, np.nextafter(size[1], size[0])))
    settings = insertion.insert_settings(insertion.bins_mm[0])
    return insert_sizes(hu, liver, spacing_mm, diameters, settings, rng, path=case.label or case.scan)


def _segment_inserted(
    hu: Float32[np.ndarray, "X Y Z"],
    labels: UInt8[np.ndarray, "X Y Z"],
    affine: Float64[np.ndarray, "4 4"],
    segment: Segmenter[Path],
    out: Path,
    *,
    device: str,
    largest_batch: int | None,
) -> Float32[np.ndarray, "X Y Z"]:
    with tempfile.TemporaryDirectory(dir=out, prefix="work-") as work:
        scan, label, folder = (Path(work) / name for name in ("scan.nii", "label.nii", "segmented"))
        # uncompressed, because compressing a scan takes longer than reading it many times
        nibabel.Nifti1Image(np.rint(hu), affine).to_filename(scan)
        nibabel.Nifti1Image(labels, affine).to_filename(label)
        folder.mkdir()
        case = LabelledScan(scan, label, (INSERTED_LIVER, INSERTED_TUMOUR), INSERTED_TUMOUR)
        prepare_case(case, segment.preprocess, folder, training=False, exclude=segment.inference.exclude)
        segmented = folder / "segmented"
        segmented.mkdir()
        segment_case(
            folder,
            segment.model,
            segment.inference,
            segment.postprocess,
            device,
            segmented,
            largest_batch=largest_batch,
        )
        return read_scan(segmented / PROBABILITY).hu
