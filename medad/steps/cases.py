"""Steps of the liver flow, from file to file. Each step writes into an existing, empty folder `out`.

Results depend only on file contents and settings, never on paths or names. They can therefore be cached by content.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medad.anomalies.insert import insert_lesions
from medad.base.errors import InputError
from medad.cohort.datasets import INSERTED_FILES, INSERTED_LIVER, INSERTED_TUMOUR, LabelledScan
from medad.config.liver import (
    EvaluationSettings,
    InsertSettings,
    PreprocessSettings,
)
from medad.ct.checks import fill_cavities, left_out_values, require_liver
from medad.ct.fingerprint import FINGERPRINT, liver_fingerprint
from medad.ct.io import (
    Geometry,
    Volume,
    check_padding,
    read_labels,
    read_scan,
    source_digest,
    write_hu,
    write_labels,
)
from medad.ct.scale import check_hu
from medad.evaluation.metrics import evaluate
from medad.organ.checks import check_given
from medad.organ.exclusion import without
from medad.slices.grid import mask_to_slices
from medad.slices.prepared_file import PREPARED, load_prepared, save_prepared
from medad.slices.preprocess import grey_per_hu, prepare
from medad.steps.read_case import read_case_labels, read_case_scan

SLICES, TRUTH, CASE = "slices.safetensors", "truth.safetensors", "case.json"
MASK, PROBABILITY, LESIONS = "mask.nii.gz", "probability.nii.gz", "lesions.json"
MUCH_EXCLUDED = 0.05
"""Share of the liver mask from which its exclusion gets a warning."""
UNNAMED_CASE = "case"
"""Case id in stored metrics. A scan with two names is evaluated once, so the artifact names no case."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as indented JSON."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _read_case(case: LabelledScan) -> tuple[Volume, ndarray, Bool[ndarray, "X Y Z"], float, list[str]]:
    """Return scan, label values, liver mask, median HU of the liver, and warnings."""
    volume = read_case_scan(case)
    labels, warnings = read_case_labels(case, volume.geometry)
    mask = case.label or case.scan
    liver = require_liver(labels, case.liver_labels, mask)
    warnings = [*volume.notes, *warnings, *left_out_values(labels, liver, case.liver_labels)]
    if case.fill_cavities:
        liver, filled = fill_cavities(liver, volume.geometry.voxel_mm3)
        warnings += filled
    check_padding(volume.cleared, liver, case.scan)
    median_hu = check_hu(volume, liver, case.scan)
    warnings += check_given(volume, liver, mask)
    return volume, labels.values, liver, median_hu, list(dict.fromkeys(warnings))


def read_truth(
    case: LabelledScan, geometry: Geometry, rule: str
) -> tuple[Bool[ndarray, "X Y Z"], Bool[ndarray, "X Y Z"]]:
    """Return the tumour mask and the liver mask of a case on the grid of `geometry`.

    The liver mask is the whole one, also if preprocessing removes fat from it. Raises InputError with the message
    `rule` if the case has no tumour label.
    """
    if case.label is None or case.tumour_label is None:
        raise InputError(case.scan, rule)
    labels, _ = read_case_labels(case, geometry)
    truth: Bool[ndarray, "X Y Z"] = labels.values == case.tumour_label
    return truth, require_liver(labels, case.liver_labels, case.label)


def insert_case(case: LabelledScan, settings: InsertSettings, out: Path) -> None:
    """Insert lesions of known shape and contrast (in HU) into the liver of a healthy scan.

    Writes scan.nii.gz (HU) and label.nii.gz (1 liver, 2 inserted lesion). Also writes lesions.json (centre, diameter,
    contrast and volume of each lesion) and case.json (fingerprint of the original liver). The lesions' positions depend
    on `settings.seed` and the scan's content.
    """
    volume, _, liver, _, _ = _read_case(case)
    write_json(out / CASE, {FINGERPRINT: liver_fingerprint(volume.hu, liver)})
    rng = np.random.default_rng([settings.seed, int(source_digest(case.scan)[:16], 16)])
    geometry = volume.geometry
    if case.spacing_mm is not None or case.affine_from != "agree":
        geometry = Geometry(geometry.shape, geometry.affine)  # a new header, which reads the same without settings
    spacing_mm = geometry.canonical_spacing_mm
    hu, tumour, lesions = insert_lesions(volume.hu, liver, spacing_mm, settings, rng, path=case.label or case.scan)
    values = liver.astype(np.uint8) * np.uint8(INSERTED_LIVER)
    values[tumour] = INSERTED_TUMOUR
    scan, label = (out / name for name in INSERTED_FILES)
    write_hu(scan, np.rint(hu), geometry)
    write_labels(label, values, geometry)
    write_json(out / LESIONS, {"inserted": True, "lesions": [asdict(lesion) for lesion in lesions]})


def prepare_case(
    case: LabelledScan, settings: PreprocessSettings, out: Path, *, training: bool, exclude: tuple[str, ...] = ()
) -> None:
    """Preprocess a case: write prepared.safetensors (slices, grid, liver) and case.json (facts about the case).

    A case to segment also gets the HU of its liver, from which its lesions are measured.

    Parameters
    ----------
    training
        True: refuse a case with tumour in its label. The method learns from healthy livers. A tumour label must not be
        used in training, not even to leave out slices.
    exclude
        Tissue to remove from the liver mask: `fat`, `vessels` or both.

    Raises
    ------
    InputError
        A file breaks a rule, or no slice contains enough liver.
    """
    volume, values, given_liver, median_hu, warnings = _read_case(case)
    if training and case.tumour_label is not None and (values == case.tumour_label).any():
        assert case.label is not None
        raise InputError(
            case.label, f"training needs healthy livers, but this label contains tumour ({case.tumour_label})"
        )
    del values
    geometry = volume.geometry
    fingerprint = liver_fingerprint(volume.hu, given_liver)
    liver_ml = float(np.count_nonzero(given_liver) * geometry.voxel_mm3 / 1000)
    liver = without(exclude, volume.hu, given_liver, geometry.canonical_spacing_mm)
    del given_liver
    left_ml = float(np.count_nonzero(liver) * geometry.voxel_mm3 / 1000)
    if not left_ml:
        raise InputError(case.scan, f"the liver mask contains only {' and '.join(exclude)}")
    share = 1 - left_ml / liver_ml
    if share > MUCH_EXCLUDED:
        warnings.append(
            f"{100 * share:.0f} % of the liver mask were left out as {' or '.join(exclude)}; check the mask"
        )
    slices = prepare(volume.hu, liver, settings, geometry.canonical_spacing_mm)
    if len(slices.z) == 0:
        raise InputError(
            case.scan, f"no slice of {settings.slice_px} px contains at least {settings.min_liver_px} liver pixels"
        )
    liver_hu = None if training else volume.hu[liver].astype(np.float16)
    save_prepared(out / PREPARED, slices, geometry, liver, grey_per_hu(settings), liver_hu)
    facts = {
        "slices": len(slices.z),
        "planes": geometry.canonical_shape[2],
        "shape": list(geometry.shape),
        "spacing_mm": list(geometry.canonical_spacing_mm),
        "liver_ml": liver_ml,
        "excluded_ml": round(liver_ml - left_ml, 2),
        "liver_median_hu": median_hu,
        FINGERPRINT: fingerprint,
        "warnings": warnings,
    }
    write_json(out / CASE, facts)


def evaluate_case(case: LabelledScan, prepared: Path, segmented: Path, settings: EvaluationSettings, out: Path) -> None:
    """Compare a segmented case with its tumour label.

    Writes metrics.json, scores.safetensors and truth.safetensors.

    Raises
    ------
    InputError
        The case has no tumour label, or a file cannot be read.
    """
    ready = load_prepared(prepared / PREPARED)
    truth, liver = read_truth(case, ready.geometry, "no tumour label to evaluate against")
    predicted = _load_slices(segmented / SLICES)
    slice_truth = mask_to_slices(truth, ready.slices)
    result = evaluate(
        UNNAMED_CASE,
        truth=truth,
        prediction=read_labels(segmented / MASK, affine_from=case.affine_from).values.astype(bool),
        probability=read_scan(segmented / PROBABILITY, affine_from=case.affine_from).hu,
        liver=liver,
        voxel_mm3=ready.geometry.voxel_mm3,
        slice_truth=slice_truth,
        slice_prediction=predicted["mask"].astype(bool),
        slice_probability=predicted["probability"],
        slice_organ=ready.slices.organ,
        settings=settings,
    )
    result.save(out)
    save_file({"tumour": slice_truth.astype(np.uint8)}, out / TRUTH)


def _load_slices(path: Path) -> dict[str, ndarray]:
    try:
        arrays: dict[str, ndarray] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"segmented slices cannot be read ({error})") from error
    return arrays
