"""The step that segments a prepared case with the networks of a model."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from medad.config.liver import InferenceSettings, PostprocessSettings
from medad.ct.io import write_mask, write_probability
from medad.evaluation.calibration import threshold_rule, to_common_scale
from medad.evaluation.experience import outside_experience
from medad.evaluation.postprocess import lesion_table, postprocess, resolve_threshold
from medad.slices.grid import map_to_volume, mask_to_slices
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.steps.calibration import facts_of, load_calibration
from medad.steps.cases import CASE, LESIONS, MASK, PROBABILITY, SLICES, write_json
from medad.steps.predict import load_members, predict_case
from medad.steps.results import Model


def segment_case(
    prepared: Path,
    model: Model[Path],
    settings: InferenceSettings,
    post: PostprocessSettings,
    device: str,
    out: Path,
    *,
    largest_batch: int | None = None,
) -> None:
    """Segment one prepared case.

    Writes mask.nii.gz (uint8) and probability.nii.gz (float32, 0 outside the liver) on the scan's own grid. Also writes
    slices.safetensors (the same on the slice grid, with the restorations), lesions.json, and case.json (seconds).

    Parameters
    ----------
    prepared
        Folder that `prepare_case` wrote.
    model
        Members and calibration, as folders that the trainings and `medad.steps.calibration.calibrate` wrote.
    settings, post
        Settings of prediction (batch size, flips, combination) and of post-processing (threshold, smallest lesion).
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    largest_batch
        Limit of slices at a time, if memory does not allow `settings.batch_size`.
    """
    started = time.monotonic()
    case = load_prepared(prepared / PREPARED, with_liver=True)
    assert case.liver is not None
    members = load_members(model.members, settings, device)
    calibration = None if model.calibration is None else load_calibration(model.calibration)
    ready = time.monotonic()
    batch_size = min(settings.batch_size, largest_batch or settings.batch_size)
    prediction = predict_case(case, members, settings, batch_size)
    predicted = time.monotonic()
    combined, warnings = prediction.probability, list[str]()
    if calibration is not None:
        combined = to_common_scale(combined, case.slices.organ, calibration.middle)
        warnings = outside_experience(facts_of(prepared, case), calibration.experience)
    probability = map_to_volume(combined, case.slices)
    np.copyto(probability, 0.0, where=~case.liver)
    geometry = case.geometry
    calibrated = None if calibration is None else calibration.threshold
    threshold = resolve_threshold(probability, case.liver, post, calibrated)
    rule = threshold_rule(post, threshold, calibration)
    post = post.model_copy(update={"threshold": threshold})
    mask = postprocess(probability, case.liver, geometry.voxel_mm3, post)
    mask_hu = None if case.liver_hu is None else case.liver_hu[mask[case.liver]]
    lesions = lesion_table(mask, probability, geometry.canonical_affine, mask_hu)
    write_probability(out / PROBABILITY, probability, geometry)
    write_mask(out / MASK, mask, geometry)
    slices = case.slices
    arrays = {
        "pixels": slices.pixels,
        "organ": slices.organ.astype(np.uint8),
        "restored": prediction.restored,
        "probability": combined,
        "mask": mask_to_slices(mask, slices).astype(np.uint8),
        "z": slices.z,
    }
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, out / SLICES)
    table = {
        "status": "lesions" if lesions else "no lesion",
        "threshold": threshold,
        "threshold_rule": rule,
        "min_lesion_mm3": post.min_lesion_mm3,
        "liver_ml": float(np.count_nonzero(case.liver) * geometry.voxel_mm3 / 1000),
        "lesion_count": len(lesions),
        "lesion_ml": sum(lesion.volume_mm3 for lesion in lesions) / 1000,
        "lesions": [asdict(lesion) for lesion in lesions],
        "warnings": warnings,
    }
    write_json(out / LESIONS, table)
    seconds = {
        "load_seconds": round(ready - started, 3),
        "network_seconds": round(predicted - ready, 3),
        "total_seconds": round(time.monotonic() - started, 3),
    }
    write_json(out / CASE, {"slices": len(slices.z), "device": str(members[0].networks.device), **seconds})
