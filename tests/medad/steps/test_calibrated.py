"""Segmentation with a calibrated model: the common scale, the threshold and the warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy import ndarray
from safetensors.numpy import load_file

from medad.base.storage import write_bytes
from medad.cohort.datasets import LabelledScan
from medad.config.liver import InferenceSettings, NetSettings, PostprocessSettings, PreprocessSettings
from medad.evaluation.calibration import Calibration
from medad.evaluation.experience import ScanFacts
from medad.evaluation.postprocess import resolve_threshold
from medad.networks import nets
from medad.networks.infer import Networks, Prediction
from medad.steps.calibration import CALIBRATION
from medad.steps.cases import prepare_case
from medad.steps.results import Member, Model
from medad.steps.segment import segment_case

SIDE, PLANES = 48, 10
NET = NetSettings(widths=(8, 8, 8), groups=4)
CALIBRATED = PostprocessSettings(threshold="calibrated")
IN_HU = PreprocessSettings(slice_px=SIDE, equalise=False, standardise="median", window_hu=(-150, 150))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a liver of about 100 HU with a tumour of 40 HU."""
    root = tmp_path_factory.mktemp("prepared")
    labels = np.zeros((SIDE, SIDE, PLANES), np.uint8)
    labels[8:40, 8:40, 1:9] = 1
    labels[12:18, 14:20, 3:7] = 2
    hu = np.random.default_rng(0).normal(100, 6, labels.shape)
    hu = np.where(labels > 0, hu - 60 * (labels == 2), -100).astype(np.int16)
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(hu, affine), root / "scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, affine), root / "label.nii.gz")
    prepare_case(LabelledScan(root / "scan.nii.gz", root / "label.nii.gz", (1, 2), 2), IN_HU, root, training=False)
    return root


@pytest.fixture
def member(tmp_path: Path) -> Member[Path]:
    for role in nets.PHASES:
        (tmp_path / role).mkdir()
        net = nets.build(role, NET, torch.Generator().manual_seed(1))
        nets.save(tmp_path / role / "model.safetensors", net, role, NET)
    return Member(tmp_path / "restoration", tmp_path / "segmentation")


def _calibration(folder: Path, **changes: Any) -> Path:
    facts = ScanFacts(liver_hu=100, vessel_hu=12, noise_hu=5, plane_mm=3)
    values: dict[str, Any] = {
        "threshold": 0.4, "middle": 0.0, "decided_by": "dice", "allowed_ml": 5, "marked_ml": 1, "dice": 0.7,
        "healthy_scans": 1, "copies": 4, "experience": (facts,),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    write_bytes(folder / CALIBRATION, Calibration(**values | changes).model_dump_json().encode())
    return folder


def _segment(prepared: Path, model: Model[Path], out: Path, post: PostprocessSettings = CALIBRATED) -> dict[str, Any]:
    out.mkdir()
    segment_case(prepared, model, InferenceSettings(), post, "cpu", out)
    found: dict[str, Any] = json.loads((out / "lesions.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the networks by a map of 0.05 with 0.2 in the tumour."""

    def predict(pixels: ndarray, networks: Networks, batch_size: int, *, flips: bool) -> Prediction:
        return Prediction(np.where(pixels < 100, 0.2, 0.05).astype(np.float32), pixels)

    monkeypatch.setattr("medad.steps.predict.predict", predict)


@pytest.mark.usefixtures("oracle")
def test_the_map_is_moved_to_the_common_scale_and_cut_at_the_calibrated_threshold(
    prepared: Path, member: Member[Path], tmp_path: Path
) -> None:
    """The healthy median becomes 1/2. The tumour has odds 0.25 of 0.0526 to 1, which are 4.75 times as high."""
    calibrated = Model((member,), _calibration(tmp_path / "c", threshold=0.6))
    table = _segment(prepared, calibrated, tmp_path / "out")
    assert table["threshold"] == 0.6
    assert table["lesion_count"] == 1
    assert table["lesion_ml"] == pytest.approx(6 * 6 * 4 * 12 / 1000, rel=0.01)
    slices = load_file(tmp_path / "out" / "slices.safetensors")
    organ = slices["organ"].astype(bool)
    assert np.median(slices["probability"][organ]) == pytest.approx(0.5, abs=1e-4)
    assert slices["probability"].max() == pytest.approx(4.75 / 5.75, abs=1e-3)
    assert (slices["probability"][~organ] == 0).all()
    higher = Model((member,), _calibration(tmp_path / "c", threshold=0.9))
    assert _segment(prepared, higher, tmp_path / "higher")["lesion_count"] == 0


@pytest.mark.usefixtures("oracle")
def test_without_a_calibration_the_map_stays_and_the_threshold_is_automatic(
    prepared: Path, member: Member[Path], tmp_path: Path
) -> None:
    table = _segment(prepared, Model((member,)), tmp_path / "out")
    assert 0.35 <= table["threshold"] <= 0.5
    slices = load_file(tmp_path / "out" / "slices.safetensors")
    assert slices["probability"].max() == pytest.approx(0.2)
    assert table["warnings"] == []


@pytest.mark.usefixtures("oracle")
def test_a_fixed_threshold_counts_on_the_common_scale(prepared: Path, member: Member[Path], tmp_path: Path) -> None:
    model = Model((member,), _calibration(tmp_path / "c"))
    table = _segment(prepared, model, tmp_path / "out", PostprocessSettings(threshold=0.7))
    assert (table["threshold"], table["lesion_count"]) == (0.7, 1)


@pytest.mark.usefixtures("oracle")
def test_a_scan_unlike_the_training_scans_gives_warnings(prepared: Path, member: Member[Path], tmp_path: Path) -> None:
    usual = _segment(prepared, Model((member,), _calibration(tmp_path / "c")), tmp_path / "usual")
    assert not any("median of the liver" in text or "planes" in text for text in usual["warnings"])
    other = ScanFacts(liver_hu=60, vessel_hu=12, noise_hu=5, plane_mm=1)
    model = Model((member,), _calibration(tmp_path / "c", experience=(other,)))
    warnings = _segment(prepared, model, tmp_path / "unusual")["warnings"]
    assert any("median of the liver" in text and "training scans: 60 to 60 HU" in text for text in warnings)
    assert any("distance between planes 3 mm; training scans: 1 to 1 mm" in text for text in warnings)


def test_each_kind_of_threshold() -> None:
    """Compare the fixed, the calibrated and the automatic threshold of the same map."""
    probability = np.random.default_rng(0).beta(1, 9, (12, 12, 12)).astype(np.float32)
    liver = np.ones(probability.shape, bool)
    automatic = resolve_threshold(probability, liver, PostprocessSettings(threshold="auto"))
    fixed = PostprocessSettings(threshold=0.7)
    assert resolve_threshold(probability, liver, fixed, 0.3) == 0.7
    assert resolve_threshold(probability, liver, CALIBRATED, 0.3) == 0.3
    assert resolve_threshold(probability, liver, CALIBRATED) == automatic
    assert resolve_threshold(probability, liver, PostprocessSettings(threshold="auto"), 0.3) == automatic
