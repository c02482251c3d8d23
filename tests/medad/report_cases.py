"""Folders of cases and trainings with known content, as the steps before the liver report write them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from medad.config.liver import DatasetSettings, EvaluationSettings, LiverSettings
from medad.evaluation.metrics import evaluate
from medad.evaluation.postprocess import lesion_table
from medad.steps.results import CaseResult
from tests.medad.prepared import save_slices
from tests.page import WrittenReport

Array = np.ndarray[Any, Any]
SIZE, DEPTH = 48, 10
AFFINE = np.diag([-1.5, -1.5, 3.0, 1.0])


def liver_settings(**changes: Any) -> LiverSettings:
    values: dict[str, Any] = {
        "name": "run-1",
        "train_data": DatasetSettings(root="/srv/hospital/Smith_John/btcv", layout="btcv"),
        "test_data": DatasetSettings(root="samples:lits", layout="lits"),
    }
    return LiverSettings(**(values | changes))


def write_case(
    root: Path,
    case_id: str,
    *,
    seed: int = 0,
    truth: bool = True,
    lesions: bool = True,
    inserted: Sequence[dict[str, Any]] | None = None,
    warnings: Sequence[str] = (),
) -> CaseResult[Path]:
    """Write the folders of one case as the steps before the report do. The scan's grid is the slice grid."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    organ = np.stack([((x - 20) / 14) ** 2 + ((y - 24) / 18) ** 2 <= 1] * DEPTH)
    organ[0] = (x - 20) ** 2 + (y - 24) ** 2 <= 4
    pixels = np.where(organ, rng.integers(90, 200, organ.shape), 0).astype(np.uint8)
    tumour, mask = np.zeros_like(organ), np.zeros_like(organ)
    if lesions:
        tumour[3:7] = (x - 16) ** 2 + (y - 20) ** 2 <= 25
        # in each next slice, the prediction is shifted by one more pixel
        for z in range(3, 7):
            mask[z] = (x - 13 - z) ** 2 + (y - 20) ** 2 <= 25
        mask[8, 30:33, 22:25] = True
    probability = np.where(organ, np.where(mask, 0.9, 0.1), 0.0).astype(np.float32)
    folders = {name: root / case_id / name for name in ("prepared", "segmented", "evaluated", "inserted")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    z_index = np.arange(DEPTH, dtype=np.int64)

    def volume(slices: Array) -> Array:
        return np.ascontiguousarray(slices.transpose(2, 1, 0))

    save_slices(folders["prepared"], pixels, organ, affine=AFFINE)
    facts = {"liver_ml": 123.0, "slices": DEPTH, "spacing_mm": [1.5, 1.5, 3.0], "liver_median_hu": 101.5}
    write_json(folders["prepared"] / "case.json", {**facts, "warnings": list(warnings)})
    tensors: dict[str, Array] = {
        "pixels": pixels,
        "organ": organ.astype(np.uint8),
        "restored": np.where(organ, 140, 7).astype(np.uint8),
        "probability": probability,
        "mask": mask.astype(np.uint8),
        "z": z_index,
    }
    save_file(tensors, folders["segmented"] / "slices.safetensors")
    table = lesion_table(volume(mask), volume(probability), AFFINE)
    found = {
        "status": "lesions" if table else "no lesion",
        "threshold": 0.5,
        "threshold_rule": "set in the configuration",
        "min_lesion_mm3": 0.0,
        "liver_ml": 123.0,
        "lesion_count": len(table),
        "lesion_ml": sum(lesion.volume_mm3 for lesion in table) / 1000,
        "lesions": [dataclasses.asdict(lesion) for lesion in table],
        "warnings": [],
    }
    write_json(folders["segmented"] / "lesions.json", found)
    write_json(folders["segmented"] / "case.json", {"slices": DEPTH, "device": "cpu", "total_seconds": 4.5})
    if truth:
        evaluation = evaluate(
            case_id,
            truth=volume(tumour),
            prediction=volume(mask),
            probability=volume(probability),
            liver=volume(organ),
            voxel_mm3=6.75,
            slice_truth=tumour,
            slice_prediction=mask,
            slice_probability=probability,
            slice_organ=organ,
            settings=EvaluationSettings(),
        )
        evaluation.save(folders["evaluated"])
        save_file({"tumour": tumour.astype(np.uint8)}, folders["evaluated"] / "truth.safetensors")
    if inserted is not None:
        write_json(folders["inserted"] / "lesions.json", {"inserted": True, "lesions": list(inserted)})
    return CaseResult(
        case_id,
        folders["prepared"],
        folders["segmented"],
        folders["evaluated"] if truth else None,
        folders["inserted"] if inserted is not None else None,
    )


def write_curve(folder: Path, phase: str, loss: Sequence[float]) -> Path:
    folder.mkdir(parents=True)
    curve = {"phase": phase, "epochs": 2, "seconds": 90.0, "steps": list(range(len(loss))), "loss": list(loss)}
    write_json(folder / "curve.json", curve)
    return folder


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


Report = Callable[..., WrittenReport]
