"""HU baseline: tumour detection from smoothed HU only, without training. A method must do better than this."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64
from numpy import ndarray
from scipy import ndimage

from medad.base.boxes import bounding_box
from medad.base.robust import MAD_TO_SD
from medad.cohort.datasets import LabelledScan
from medad.config.liver import EvaluationSettings, PostprocessSettings
from medad.evaluation.metrics import evaluate
from medad.evaluation.postprocess import postprocess
from medad.slices.grid import mask_to_slices
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.steps.cases import UNNAMED_CASE, read_truth
from medad.steps.read_case import read_case_scan

THRESHOLD_SDS = 3.0
"""Threshold for tumour, in robust standard deviations from the median. It uses no label."""

DEFINITION = (
    "Distance of the smoothed HU from the median HU of the liver. HU are smoothed within the liver by a Gaussian of "
    "{sigma:g} mm. No training and no label are used. The mask contains the voxels more than "
    f"{THRESHOLD_SDS:g} robust standard deviations ({MAD_TO_SD} x the median absolute deviation) from the median."
)


def smooth_within_liver(
    hu: Float32[ndarray, "X Y Z"], liver: Bool[ndarray, "X Y Z"], sigma_voxels: tuple[float, float, float]
) -> Float64[ndarray, " voxels"]:
    """Return the Gaussian mean of HU over liver voxels only, for each liver voxel in C order.

    This is a normalised convolution. Voxels outside the liver have no influence, so the rim of the liver does not look
    like an edge.
    """
    weight = ndimage.gaussian_filter(liver.astype(np.float32), sigma_voxels)
    total = ndimage.gaussian_filter(np.where(liver, hu, 0).astype(np.float32), sigma_voxels)
    inside: Float64[ndarray, " voxels"] = total[liver].astype(np.float64) / weight[liver]
    return inside


def deviation_score(smooth: Float64[ndarray, " voxels"], median_hu: float) -> Float64[ndarray, " voxels"]:
    """Return d / (d + t) in 0..1, where d is the distance from the liver's median. Tumour is 0.5 and above (d >= t).

    t is `THRESHOLD_SDS` robust standard deviations of the smoothed values around that median. No label is used. If half
    of the values equal the median, any difference counts as tumour. The score increases with d, so its AUROC is that of
    the distance.
    """
    distance = np.abs(smooth - median_hu)
    threshold = THRESHOLD_SDS * MAD_TO_SD * float(np.median(distance))
    if threshold == 0.0:
        return np.where(distance > 0, 1.0, 0.0)
    score: Float64[ndarray, " voxels"] = distance / (distance + threshold)
    return score


def baseline_case(
    case: LabelledScan,
    prepared: Path,
    sigma_mm: float,
    min_lesion_mm3: float,
    settings: EvaluationSettings,
    out: Path,
) -> None:
    """Evaluate the HU baseline on a case, and write metrics.json and scores.safetensors.

    Parameters
    ----------
    prepared
        Folder of `prepare_case`. Its liver and slice grid make the metrics cover the same voxels and slices as the
        networks' metrics.
    sigma_mm
        Standard deviation of the Gaussian smoothing.
    min_lesion_mm3
        Smallest lesion. Smaller ones are dropped, as in the networks' masks.

    Raises
    ------
    InputError
        The case has no tumour label, or a file cannot be read.
    """
    ready = load_prepared(prepared / PREPARED)
    truth, liver = read_truth(case, ready.geometry, "no tumour label to evaluate against")
    hu = read_case_scan(case).hu
    box = bounding_box(liver)
    assert box is not None, "a prepared case contains liver"
    x, y, z = (sigma_mm / spacing for spacing in ready.geometry.canonical_spacing_mm)
    probability = np.zeros(liver.shape, np.float32)
    smooth = smooth_within_liver(hu[box], liver[box], (x, y, z))
    probability[liver] = deviation_score(smooth, float(np.median(hu[liver])))
    voxel_mm3 = ready.geometry.voxel_mm3
    post = PostprocessSettings(threshold=0.5, min_lesion_mm3=min_lesion_mm3)
    mask = postprocess(probability, liver, voxel_mm3, post)
    slices = ready.slices
    # the metrics use only the largest value of a slice's map inside the liver
    largest = probability.max(axis=(0, 1))[slices.z][:, None, None] * slices.organ
    evaluate(
        UNNAMED_CASE,
        truth=truth,
        prediction=mask,
        probability=probability,
        liver=liver,
        voxel_mm3=voxel_mm3,
        slice_truth=mask_to_slices(truth, slices),
        slice_prediction=mask_to_slices(mask, slices),
        slice_probability=largest.astype(np.float32),
        slice_organ=slices.organ,
        settings=settings,
    ).save(out)
