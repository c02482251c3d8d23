"""The HU baseline on volumes with known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medad.base.robust import MAD_TO_SD
from medad.cohort.datasets import LabelledScan, find_cases
from medad.cohort.phantom import write_lits_phantoms
from medad.config.liver import DatasetSettings, EvaluationSettings, PreprocessSettings
from medad.evaluation.metrics import CaseEvaluation, auroc
from medad.steps.baseline import THRESHOLD_SDS, baseline_case, deviation_score, smooth_within_liver
from medad.steps.cases import prepare_case


def test_what_lies_outside_the_liver_has_no_part() -> None:
    liver = np.zeros((9, 8, 7), bool)
    liver[2:7, 2:6, 1:6] = True
    rng = np.random.default_rng(0)
    hu = np.where(liver, 100.0, rng.normal(-500, 300, liver.shape)).astype(np.float32)
    np.testing.assert_allclose(smooth_within_liver(hu, liver, (1.5, 1.0, 2.0)), 100.0, rtol=1e-5)


def test_a_flat_average_within_the_liver() -> None:
    """A very wide Gaussian gives nearly equal weights, so the result is the mean of the liver voxels."""
    liver = np.ones((5, 5, 5), bool)
    liver[0, 0, 0] = False
    hu = np.arange(125, dtype=np.float32).reshape(5, 5, 5)
    np.testing.assert_allclose(smooth_within_liver(hu, liver, (60.0, 60.0, 60.0)), hu[liver].mean(), rtol=0.02)


def test_the_threshold_is_three_robust_sds() -> None:
    smooth = np.array([90.0, 98.0, 99.0, 100.0, 101.0, 102.0, 140.0])
    t = THRESHOLD_SDS * MAD_TO_SD * 2.0  # distances 10, 2, 1, 0, 1, 2, 40: the median is 2
    score = deviation_score(smooth, 100.0)
    np.testing.assert_allclose(score, [d / (d + t) for d in (10, 2, 1, 0, 1, 2, 40)])
    assert [bool(one) for one in score >= 0.5] == [True, False, False, False, False, False, True]


def test_without_any_spread_a_difference_is_tumour() -> None:
    assert deviation_score(np.array([5.0, 5.0, 5.0, 6.0]), 5.0).tolist() == [0, 0, 0, 1]


def test_scores_keep_the_order_of_distances() -> None:
    rng = np.random.default_rng(1)
    smooth = rng.normal(100, 10, 500)
    truth = rng.random(500) < 0.2
    assert auroc(deviation_score(smooth, 103.0), truth) == auroc(np.abs(smooth - 103.0), truth)


def test_a_case_is_judged_on_the_same_voxels_as_the_networks(tmp_path: Path) -> None:
    write_lits_phantoms(tmp_path / "lits", 1, seed=2, shape=(48, 40, 10), spacing_mm=(7.0, 7.0, 12.0))
    data = DatasetSettings(root=str(tmp_path / "lits"), layout="lits")
    (found,), _ = find_cases(data)
    case = LabelledScan.of(found, data)
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    prepared.mkdir()
    out.mkdir()
    prepare_case(case, PreprocessSettings(slice_px=64), prepared, training=False)
    baseline_case(case, prepared, 3.0, 0.0, EvaluationSettings(), out)
    metrics = CaseEvaluation.load(out).metrics
    assert metrics.true_lesions >= 1
    assert metrics.voxel_auroc is not None
    assert metrics.voxel_auroc > 0.8, "the phantom's lesions differ from its liver only in HU"
    larger = tmp_path / "larger"
    larger.mkdir()
    baseline_case(case, prepared, 3.0, 1e9, EvaluationSettings(), larger)
    assert CaseEvaluation.load(larger).metrics.predicted_lesions == 0, "all lesions are smaller"
    assert CaseEvaluation.load(larger).metrics.voxel_auroc == pytest.approx(metrics.voxel_auroc)
