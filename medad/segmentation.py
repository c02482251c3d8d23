"""`medad.segment`: segmentation of the tumours in one CT from Python, without Prefect, cache or server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from medad.base.errors import ConfigError
from medad.base.manifest import MANIFEST
from medad.base.storage import read_json
from medad.cohort.datasets import LabelledScan
from medad.config.liver import InferenceSettings, PostprocessSettings
from medad.config.packaged import model_folder
from medad.ct.io import AffineFrom, Geometry, read_labels, read_scan, write_mask, write_probability
from medad.evaluation.postprocess import Lesion
from medad.steps.cases import CASE, LESIONS, MASK, PROBABILITY, prepare_case, segment_case
from medad.steps.trained import TrainedModel

FilePath = str | os.PathLike[str]

NO_LIVER = (
    "segment needs a liver mask on the scan's grid: liver=MASK; "
    "TotalSegmentator -i SCAN -o FOLDER --task total --roi_subset liver writes FOLDER/liver.nii.gz"
)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The tumours found in one scan.

    Arrays have the voxel order of the scan's file. For a NIfTI, shape, order and affine are those that nibabel returns.
    For MetaImage and NRRD the first axis is the file's fastest axis. For DICOM it runs along a slice's rows.
    """

    mask: Bool[np.ndarray, "I J K"]
    """Mask of the tumours: True in tumour voxels."""
    probability: Float32[np.ndarray, "I J K"]
    """Probability of tumour, 0 to 1. It is 0 outside the liver."""
    lesions: tuple[Lesion, ...]
    """Connected parts of the mask, the largest first."""
    threshold: float
    """Probability from which a voxel is in the mask."""
    warnings: tuple[str, ...]
    """Warnings about the files, one line each. They did not stop the segmentation."""
    geometry: Geometry
    """Grid of the scan's file."""

    @property
    def affine(self) -> NDArray[np.float64]:
        """Return the 4 x 4 matrix from voxel index to patient mm, RAS+."""
        return self.geometry.affine

    def save(self, folder: FilePath) -> None:
        """Write mask.nii.gz and probability.nii.gz on the scan's grid. Raises DiskFullError."""
        out = Path(folder).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        write_mask(out / MASK, self.geometry.to_canonical(self.mask), self.geometry)
        write_probability(out / PROBABILITY, self.geometry.to_canonical(self.probability), self.geometry)


def segment(
    scan: FilePath,
    liver: FilePath | None = None,
    model: FilePath | None = None,
    *,
    liver_labels: Sequence[int] = (1,),
    inference: InferenceSettings | None = None,
    postprocess: PostprocessSettings | None = None,
    device: str = "auto",
    affine_from: AffineFrom = "agree",
    affine_mismatch: Literal["error", "warn"] = "error",
) -> Segmentation:
    """Segment the tumours of one scan in the same way as `adflows liver segment`.

    Parameters
    ----------
    scan
        CT scan: .nii, .nii.gz, .mhd, .mha, .nrrd, .nhdr, or a folder that contains one DICOM series.
    liver
        Liver mask on the scan's grid. It is required for now.
    model
        Run folder written by `adflows liver train` or `run`, or its sub-folder `model`. None or `default`: the model in
        the package.
    liver_labels
        Values of the mask that are liver.
    inference, postprocess
        Batch size, threshold, smallest lesion and similar settings. None: the settings of the model's run.
    device
        Device: `auto`, `cpu`, `cuda` or `cuda:N`.
    affine_from
        NIfTI affine to use. `agree` refuses a file with different sform and qform.
    affine_mismatch
        Reaction if scan and mask have the same shape but different affines. `warn` matches their voxels by index.

    Raises
    ------
    ConfigError
        The mask or the model is missing, the folder contains no model, or the device does not exist.
    InputError
        A file cannot be used. The message names the file and the rule.
    DiskFullError
        The temporary folder has no room left.
    """
    if liver is None:
        raise ConfigError(NO_LIVER)
    trained = TrainedModel.of_run(_run_folder(model_folder(model if model is None else os.fspath(model))))
    case = LabelledScan(
        Path(scan).expanduser(), Path(liver).expanduser(), tuple(liver_labels), None, affine_from, affine_mismatch
    )
    with TemporaryDirectory(prefix="medad-") as folder:
        prepared, out = Path(folder) / "prepared", Path(folder) / "segmented"
        prepared.mkdir()
        out.mkdir()
        prepare_case(case, trained.settings.preprocess, prepared, training=False)
        segment_case(
            prepared,
            trained.model,
            inference or trained.settings.inference,
            postprocess or trained.settings.postprocess,
            device,
            out,
        )
        return _read_results(prepared, out, affine_from)


def _run_folder(model: Path) -> Path:
    """Return the run folder. If `model` is the sub-folder `model` of a run, return its parent."""
    inside = model.absolute()
    return inside.parent if inside.name == "model" and not (inside / MANIFEST).exists() else model


def _read_results(prepared: Path, segmented: Path, affine_from: AffineFrom) -> Segmentation:
    """Read the outputs of the two steps."""
    mask = read_labels(segmented / MASK, affine_from=affine_from)
    probability = read_scan(segmented / PROBABILITY, affine_from=affine_from).hu
    table = read_json(segmented / LESIONS)
    rows = [row | {"centroid_ras_mm": tuple(row["centroid_ras_mm"])} for row in table["lesions"]]
    return Segmentation(
        mask=mask.geometry.to_source(mask.values).astype(bool),
        probability=mask.geometry.to_source(probability),
        lesions=tuple(Lesion(**row) for row in rows),
        threshold=table["threshold"],
        warnings=tuple(read_json(prepared / CASE)["warnings"]),
        geometry=mask.geometry,
    )
