"""Vessels in the mask, from preparing to evaluating: removed, reported, and their tumours count as missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy import ndarray

from medad.base.errors import InputError
from medad.cohort.datasets import LabelledScan
from medad.config.liver import (
    EvaluationSettings,
    InferenceSettings,
    NetSettings,
    PostprocessSettings,
    PreprocessSettings,
)
from medad.ct.fingerprint import FINGERPRINT
from medad.evaluation.metrics import CaseEvaluation
from medad.networks import nets
from medad.networks.infer import Networks, Prediction
from medad.slices.grid import mask_to_slices
from medad.slices.prepared_file import load_prepared
from medad.steps.cases import evaluate_case, prepare_case
from medad.steps.results import Member, Model
from medad.steps.segment import segment_case

SIDE, PLANES = 48, 12
SPACING_MM = (2.0, 2.0, 3.0)
VESSEL_BELOW = 16
NET = NetSettings(widths=(8, 8, 8), groups=4)


def _case(folder: Path) -> LabelledScan:
    """Write a liver box of 100 HU, a vessel at x < 16 in LPS order, a tumour in the vessel, and one in the liver.

    The vessel is as wide as the scan, so most of it lies outside the mask.
    """
    labels = np.zeros((SIDE, SIDE, PLANES), np.uint8)
    labels[8:40, 8:40, 2:10] = 1
    labels[10:14, 14:20, 4:8] = 2
    labels[28:34, 20:28, 4:8] = 2
    hu = np.full(labels.shape, 100, np.int16)
    hu[:VESSEL_BELOW], hu[:, :2] = 180, -900
    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])
    nibabel.save(nibabel.Nifti1Image(hu, affine), folder / "scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, affine), folder / "label.nii.gz")
    return LabelledScan(folder / "scan.nii.gz", folder / "label.nii.gz", (1, 2), 2)


def _prepare(case: LabelledScan, out: Path, *exclude: str) -> dict[str, Any]:
    out.mkdir()
    prepare_case(case, PreprocessSettings(slice_px=SIDE), out, training=False, exclude=exclude)
    found: dict[str, Any] = json.loads((out / "case.json").read_text(encoding="utf-8"))
    return found


def test_the_removed_volume_is_known_and_the_liver_is_the_given_one(tmp_path: Path) -> None:
    case = _case(tmp_path)
    facts = _prepare(case, tmp_path / "clean", "vessels")
    voxel_ml = np.prod(SPACING_MM) / 1000
    prepared = load_prepared(tmp_path / "clean" / "prepared.safetensors", with_liver=True)
    assert prepared.liver is not None
    assert prepared.liver.sum((1, 2)).tolist() == [0] * VESSEL_BELOW + [32 * 8] * (40 - VESSEL_BELOW) + [0] * 8
    assert facts["excluded_ml"] == pytest.approx((VESSEL_BELOW - 8) * 32 * 8 * voxel_ml, abs=0.01)
    assert facts["liver_ml"] == pytest.approx(32 * 32 * 8 * voxel_ml)
    whole = _prepare(case, tmp_path / "whole")
    left_out = "25 % of the liver mask were left out as vessels; check the mask"
    assert facts["warnings"] == [*whole["warnings"], left_out]
    assert whole["excluded_ml"] == 0
    assert whole[FINGERPRINT] == facts[FINGERPRINT]


def test_a_mask_of_fat_alone_is_one_line(tmp_path: Path) -> None:
    case = _case(tmp_path)
    label = nibabel.load(case.label)
    values = np.asarray(label.dataobj).copy()
    values[VESSEL_BELOW - 4 :] = 0
    nibabel.save(nibabel.Nifti1Image(values, label.affine), case.label)
    hu = nibabel.load(case.scan)
    liver_hu = np.asarray(hu.dataobj).copy()
    liver_hu[: VESSEL_BELOW - 4] = -55 + np.arange(SIDE)[:, None] % 3 * 5
    nibabel.save(nibabel.Nifti1Image(liver_hu, hu.affine), case.scan)
    with pytest.raises(InputError, match="contains only fat"):
        _prepare(case, tmp_path / "out", "fat")


def test_a_tumour_in_a_removed_vessel_counts_as_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every tumour probability 1: both are found in the whole mask, and one of two without the vessel."""
    case = _case(tmp_path)
    for role in nets.PHASES:
        (tmp_path / role).mkdir()
        net = nets.build(role, NET, torch.Generator().manual_seed(1))
        nets.save(tmp_path / role / "model.safetensors", net, role, NET)
    model = Model((Member(tmp_path / "restoration", tmp_path / "segmentation"),))
    truth = np.asarray(nibabel.load(case.label).dataobj) == 2
    for name, exclude, found, dice in (
        ("whole", (), 2, 1.0),
        ("clean", ("vessels",), 1, 2 * 192 / (192 + 288)),
    ):
        _prepare(case, tmp_path / name, *exclude)
        ready = load_prepared(tmp_path / name / "prepared.safetensors").slices
        known = mask_to_slices(truth, ready).astype(np.float32)

        def oracle(
            pixels: ndarray, networks: Networks, batch_size: int, *, flips: bool, known: ndarray = known
        ) -> Prediction:
            return Prediction(known, pixels)

        monkeypatch.setattr("medad.steps.predict.predict", oracle)
        out, judged = tmp_path / f"{name}-out", tmp_path / f"{name}-judged"
        out.mkdir()
        judged.mkdir()
        segment_case(tmp_path / name, model, InferenceSettings(), PostprocessSettings(), "cpu", out)
        evaluate_case(case, tmp_path / name, out, EvaluationSettings(), judged)
        metrics = CaseEvaluation.load(judged).metrics
        assert (metrics.true_lesions, metrics.found_lesions) == (2, found)
        assert metrics.dice_3d == pytest.approx(dice)
