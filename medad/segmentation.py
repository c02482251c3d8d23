"""`medad.segment`: segmentation of the tumours in one CT from Python, without Prefect, cache or server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from medad.base.manifest import MANIFEST
from medad.base.storage import read_json
from medad.cohort.datasets import LabelledScan
from medad.config.liver import InferenceSettings, PostprocessSettings
from medad.config.packaged import model_folder
from medad.ct.io import AffineFrom, Geometry, Spacing, read_labels, read_scan, write_mask, write_probability
from medad.evaluation.postprocess import Lesion
from medad.steps.cases import CASE, LESIONS, MASK, PROBABILITY, prepare_case
from medad.steps.liver_mask import LIVER, choose_finder, find_case_liver
from medad.steps.segment import segment_case
from medad.steps.trained import TrainedModel

FilePath = str | os.PathLike[str]


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
    liver: Bool[np.ndarray, "I J K"] | None = None
    """Liver mask that was found automatically. None: the mask was given."""

    @property
    def affine(self) -> NDArray[np.float64]:
        """Return the 4 x 4 matrix from voxel index to patient mm, RAS+."""
        return self.geometry.affine

    def save(self, folder: FilePath) -> None:
        """Write mask.nii.gz, probability.nii.gz and an automatic liver.nii.gz on the scan's grid.

        Raises DiskFullError.
        """
        out = Path(folder).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        write_mask(out / MASK, self.geometry.to_canonical(self.mask), self.geometry)
        write_probability(out / PROBABILITY, self.geometry.to_canonical(self.probability), self.geometry)
        if self.liver is not None:
            write_mask(out / LIVER, self.geometry.to_canonical(self.liver), self.geometry)


def segment(
    scan: FilePath,
    liver: FilePath | None = None,
    model: FilePath | None = None,
    *,
    liver_labels: Sequence[int] = (),
    liver_model: FilePath | None = None,
    trust: bool = False,
    inference: InferenceSettings | None = None,
    postprocess: PostprocessSettings | None = None,
    device: str = "auto",
    affine_from: AffineFrom = "agree",
    affine_mismatch: Literal["error", "warn"] = "error",
    spacing_mm: Spacing | None = None,
) -> Segmentation:
    """Segment the tumours of one scan in the same way as `adflows liver segment`.

    Parameters
    ----------
    scan
        CT scan: .nii, .nii.gz, .mhd, .mha, .nrrd, .nhdr, or a folder that contains one DICOM series.
    liver
        Liver mask on the scan's grid. None: the liver is found automatically, and the result contains its mask.
    model
        Run folder written by `adflows liver train` or `run`, or its sub-folder `model`. None or `default`: the model in
        the package.
    liver_labels
        Values of the given mask that are liver. Empty: its only value, which must be 1.
    liver_model
        Network that finds the liver: a TorchScript file or a MONAI bundle. It is not used with `liver`. None:
        TotalSegmentator, if it is installed with weights, or the built-in method.
    trust
        Whether `liver_model` may be a TorchScript file, which is a program that runs when it is loaded.
    inference, postprocess
        Batch size, threshold, smallest lesion and similar settings. None: the settings of the model's run.
    device
        Device: `auto`, `cpu`, `cuda` or `cuda:N`.
    affine_from
        NIfTI affine to use. `agree` refuses a file with different sform and qform.
    affine_mismatch
        Reaction if scan and given mask have the same shape but different affines. `warn` matches voxels by index.
    spacing_mm
        Voxel size in mm along the axes of a NIfTI file whose affine is missing or the identity.

    Raises
    ------
    ConfigError
        The model is missing, the folder contains no model, or the device does not exist.
    InputError
        A file cannot be used, or no liver was found. The message names the file and the rule.
    DiskFullError
        The temporary folder has no room left.
    """
    trained = TrainedModel.of_run(_run_folder(model_folder(model if model is None else os.fspath(model))))
    path = Path(scan).expanduser()
    with TemporaryDirectory(prefix="medad-") as folder:
        prepared, out, found = (Path(folder) / name for name in ("prepared", "segmented", "liver"))
        for each in (prepared, out, found):
            each.mkdir()
        if liver is None:
            network = None if liver_model is None else Path(liver_model).expanduser()
            finder = choose_finder(network, trust=trust)
            find_case_liver(path, finder, found, affine_from=affine_from, spacing_mm=spacing_mm, device=device)
            case = LabelledScan(path, found / LIVER, (1,), None, affine_from, spacing_mm=spacing_mm)
        else:
            mask = Path(liver).expanduser()
            rules = (affine_from, affine_mismatch, spacing_mm, True)
            case = LabelledScan(path, mask, tuple(liver_labels), None, *rules)
        exclude = trained.settings.inference.exclude
        prepare_case(case, trained.settings.preprocess, prepared, training=False, exclude=exclude)
        segment_case(
            prepared,
            trained.model,
            inference or trained.settings.inference,
            postprocess or trained.settings.postprocess,
            device,
            out,
        )
        result = _read_results(prepared, out, affine_from)
        return result if liver is not None else _with_liver(result, found, affine_from)


def _run_folder(model: Path) -> Path:
    """Return the run folder. If `model` is the sub-folder `model` of a run, return its parent."""
    inside = model.absolute()
    return inside.parent if inside.name == "model" and not (inside / MANIFEST).exists() else model


def _with_liver(result: Segmentation, found: Path, affine_from: AffineFrom) -> Segmentation:
    """Add the automatic liver mask, and a warning that says how it was made."""
    labels = read_labels(found / LIVER, affine_from=affine_from)
    facts = read_json(found / CASE)
    how = f"{facts['method']}, sureness {facts['sureness']:.2f}, {facts['liver_ml']:.0f} mL"
    lines = (f"the liver mask was made automatically ({how}); check it", *facts["notes"])
    mask = labels.geometry.to_source(labels.values).astype(bool)
    return replace(result, liver=mask, warnings=(*result.warnings, *lines))


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
        warnings=(*read_json(prepared / CASE)["warnings"], *table["warnings"]),
        geometry=mask.geometry,
    )
