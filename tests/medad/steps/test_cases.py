"""The steps of the liver flow on phantoms, and known facts of real scans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from medad.base.errors import InputError
from medad.cohort.datasets import LabelledScan, find_cases
from medad.cohort.phantom import write_btcv_phantoms, write_lits_phantoms
from medad.config.header import HeaderSettings
from medad.config.liver import (
    DatasetSettings,
    EvaluationSettings,
    InferenceSettings,
    InsertSettings,
    NetSettings,
    PostprocessSettings,
    PreprocessSettings,
)
from medad.ct.io import read_labels, read_scan
from medad.evaluation.metrics import CaseEvaluation, dice
from medad.networks import nets
from medad.slices.grid import mask_to_slices
from medad.slices.prepared_file import load_prepared
from medad.steps.by_hand import step_equalise, step_roi, step_slice, step_window
from medad.steps.cases import evaluate_case, insert_case, prepare_case
from medad.steps.results import Member, Model
from medad.steps.segment import segment_case
from tests.medad.prepared import write_prepared

PREPROCESS = PreprocessSettings(slice_px=64)
NET = NetSettings(widths=(8, 8, 8), groups=4)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> LabelledScan:
    root = tmp_path_factory.mktemp("btcv")
    write_btcv_phantoms(root, 1)
    data = DatasetSettings(root=str(root), layout="btcv")
    return LabelledScan.of(find_cases(data)[0][0], data)


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> LabelledScan:
    root = tmp_path_factory.mktemp("lits")
    write_lits_phantoms(root, 1)
    data = DatasetSettings(root=str(root), layout="lits")
    return LabelledScan.of(find_cases(data)[0][0], data)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model[Path]:
    """Return both networks with seeded random weights. Their outputs do not matter here, only the files do."""
    root = tmp_path_factory.mktemp("model")
    for role in nets.PHASES:
        (root / role).mkdir()
        net = nets.build(role, NET, torch.Generator().manual_seed(1))
        nets.save(root / role / "model.safetensors", net, role, NET)
    return Model((Member(root / "restoration", root / "segmentation"),))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_prepare_tells_what_is_there(healthy: LabelledScan, tmp_path: Path) -> None:
    prepare_case(healthy, PREPROCESS, tmp_path, training=True)
    facts = json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))
    prepared = load_prepared(tmp_path / "prepared.safetensors", with_liver=True)
    image = nibabel.load(healthy.label)
    voxels = np.count_nonzero(np.asarray(image.dataobj) == 6)
    assert facts["liver_ml"] == pytest.approx(voxels * np.prod(image.header.get_zooms()) / 1000, rel=1e-6)
    assert facts["slices"] == len(prepared.slices.z) == np.count_nonzero((np.asarray(image.dataobj) == 6).any((0, 1)))
    assert prepared.liver is not None
    assert np.count_nonzero(prepared.liver) == voxels


def test_training_refuses_tumour_and_testing_does_not(ill: LabelledScan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training needs healthy livers, but this label contains tumour \(2\)"):
        prepare_case(ill, PREPROCESS, _folder(tmp_path / "a"), training=True)
    prepare_case(ill, PREPROCESS, _folder(tmp_path / "b"), training=False)


def test_prepared_slices_do_not_depend_on_the_tumour_label(ill: LabelledScan, tmp_path: Path) -> None:
    """Relabel every tumour voxel as liver: the prepared case stays the same, so it contains no ground truth."""
    image = nibabel.load(ill.label)
    merged = np.minimum(np.asarray(image.dataobj), 1).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(merged, image.affine, image.header), tmp_path / "merged.nii.gz")
    prepare_case(ill, PREPROCESS, _folder(tmp_path / "a"), training=False)
    blind = LabelledScan(ill.scan, tmp_path / "merged.nii.gz", (1, 2), 2)
    prepare_case(blind, PREPROCESS, _folder(tmp_path / "b"), training=False)
    name = "prepared.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_four_steps_by_hand_equal_prepare(healthy: LabelledScan, tmp_path: Path) -> None:
    prepare_case(healthy, PREPROCESS, tmp_path, training=True)
    source = healthy.scan
    for name, step in (("window", step_window), ("roi", step_roi), ("slice", step_slice), ("equalise", step_equalise)):
        out = _folder(tmp_path / name)
        step(source, healthy.label, (6,), PREPROCESS, HeaderSettings(), out)
        source = next(out.iterdir())
    whole, by_hand = load_prepared(tmp_path / "prepared.safetensors"), load_prepared(source)
    np.testing.assert_array_equal(by_hand.slices.pixels, whole.slices.pixels)
    np.testing.assert_array_equal(by_hand.slices.organ, whole.slices.organ)


def test_steps_name_what_is_missing(healthy: LabelledScan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a liver mask"):
        step_roi(healthy.label or tmp_path, None, (6,), PREPROCESS, HeaderSettings(), tmp_path)
    with pytest.raises(InputError, match="expected a grey image"):
        step_roi(healthy.scan, healthy.label, (6,), PREPROCESS, HeaderSettings(), tmp_path)


def test_segmentation_lies_on_the_scans_grid(
    ill: LabelledScan, model: Model[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, out = _folder(tmp_path / "prepared"), _folder(tmp_path / "out")
    prepare_case(ill, PREPROCESS, prepared, training=False)
    post = PostprocessSettings(threshold=0.5, min_lesion_mm3=200)
    segment_case(prepared, model, InferenceSettings(), post, "cpu", out)
    scan, label = nibabel.load(ill.scan), np.asarray(nibabel.load(ill.label).dataobj)
    for name in ("mask.nii.gz", "probability.nii.gz"):
        written = nibabel.load(out / name)
        assert written.shape == scan.shape
        assert written.affine.tobytes() == scan.affine.tobytes()
        assert (np.asarray(written.dataobj)[label == 0] == 0).all()
    mask = read_labels(out / "mask.nii.gz").values.astype(bool)
    probability = read_scan(out / "probability.nii.gz").hu
    assert (probability[mask] >= 0.5).all()
    table = json.loads((out / "lesions.json").read_text(encoding="utf-8"))
    voxel_mm3 = float(np.prod(scan.header.get_zooms()))
    assert sum(lesion["volume_mm3"] for lesion in table["lesions"]) == pytest.approx(mask.sum() * voxel_mm3, rel=1e-6)
    assert all(lesion["volume_mm3"] >= 200 for lesion in table["lesions"])
    hu = read_scan(ill.scan).hu
    total_hu = sum(lesion["volume_mm3"] * lesion["mean_hu"] for lesion in table["lesions"])
    assert total_hu / voxel_mm3 == pytest.approx(float(hu[mask].sum()), rel=1e-3)
    slices = load_file(out / "slices.safetensors")
    ready = load_prepared(prepared / "prepared.safetensors").slices
    np.testing.assert_array_equal(slices["mask"].astype(bool), mask_to_slices(mask, ready))
    np.testing.assert_array_equal(slices["pixels"], ready.pixels)


def test_evaluation_of_a_perfect_and_of_an_empty_answer(
    ill: LabelledScan, model: Model[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the networks by one that knows the ground truth on the slice grid, and by one that finds nothing."""
    from medad.networks.infer import Networks, Prediction

    prepared = _folder(tmp_path / "prepared")
    prepare_case(ill, PREPROCESS, prepared, training=False)
    truth = read_labels(ill.label or tmp_path).values == 2
    ready = load_prepared(prepared / "prepared.safetensors").slices
    for name, level in (("perfect", 0.9), ("blind", 0.0)):
        known = mask_to_slices(truth, ready).astype(np.float32) * np.float32(level)

        def oracle(
            pixels: np.ndarray, networks: Networks, batch_size: int, *, flips: bool, known: np.ndarray = known
        ) -> Prediction:  # fmt: skip
            return Prediction(known, pixels)

        monkeypatch.setattr("medad.steps.predict.predict", oracle)
        out, judged = _folder(tmp_path / name), _folder(tmp_path / f"{name}-evaluated")
        segment_case(prepared, model, InferenceSettings(), PostprocessSettings(), "cpu", out)
        evaluate_case(ill, prepared, out, EvaluationSettings(), judged)
        metrics = CaseEvaluation.load(judged).metrics
        written = read_labels(out / "mask.nii.gz").values.astype(bool)
        assert metrics.dice_3d == pytest.approx(dice(written, truth))
        if name == "perfect":
            assert metrics.dice_3d > 0.75  # the slice grid is coarser than the scan
            assert metrics.voxel_auroc is not None
            assert metrics.voxel_auroc > 0.95
            assert metrics.found_lesions == metrics.true_lesions == 2
            assert metrics.false_positives == 0
        else:
            assert metrics.dice_3d == 0
            assert metrics.voxel_auroc == 0.5
            assert metrics.found_lesions == 0
            assert json.loads((out / "lesions.json").read_text(encoding="utf-8"))["status"] == "no lesion"


def test_inserted_lesions_are_where_the_label_says(healthy: LabelledScan, tmp_path: Path) -> None:
    settings = InsertSettings(count=2, diameter_mm=(12, 20), contrast_hu=(-60, -50), edge_mm=0)
    insert_case(healthy, settings, tmp_path)
    inserted = LabelledScan.inserted(tmp_path)
    before, after = read_scan(healthy.scan), read_scan(inserted.scan)
    labels = read_labels(inserted.label or tmp_path).values
    change = after.hu - before.hu
    assert (change[labels != 2] == 0).all()
    assert ((change[labels == 2] >= -60.5) & (change[labels == 2] <= -49.5)).all()
    original = read_labels(healthy.label or tmp_path).values
    np.testing.assert_array_equal(labels > 0, original == 6)
    lesions = json.loads((tmp_path / "lesions.json").read_text(encoding="utf-8"))["lesions"]
    assert len(lesions) == 2
    assert nibabel.load(inserted.scan).affine.tobytes() == nibabel.load(healthy.scan).affine.tobytes()


def with_identity(case: LabelledScan, folder: Path) -> LabelledScan:
    """Return the case with headers that know no geometry."""
    assert case.label is not None
    for name, path in (("scan", case.scan), ("label", case.label)):
        nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), np.eye(4)), folder / f"{name}.nii.gz")
    return replace(case, scan=folder / "scan.nii.gz", label=folder / "label.nii.gz")


def test_a_given_spacing_reaches_the_volumes(healthy: LabelledScan, tmp_path: Path) -> None:
    x, y, z = (float(mm) for mm in nibabel.load(healthy.scan).header.get_zooms())
    spacing = (x, y, z)
    case = with_identity(healthy, tmp_path)
    prepare_case(healthy, PREPROCESS, _folder(tmp_path / "a"), training=False)
    prepare_case(case, PREPROCESS, _folder(tmp_path / "b"), training=False)
    known = replace(case, spacing_mm=spacing)
    prepare_case(known, PREPROCESS, _folder(tmp_path / "c"), training=False)
    right, assumed, given = (
        json.loads((tmp_path / name / "case.json").read_text(encoding="utf-8")) for name in ("a", "b", "c")
    )
    assert given["liver_ml"] == pytest.approx(right["liver_ml"])
    assert assumed["liver_ml"] == pytest.approx(right["liver_ml"] / np.prod(spacing))
    assert sum("1 x 1 x 1 mm were assumed" in each for each in assumed["warnings"]) == 1, "once for scan and label"
    # a scan with inserted lesions has a header that needs no setting
    settings = InsertSettings(count=1, diameter_mm=(12, 20), contrast_hu=(-60, -50))
    insert_case(known, settings, _folder(tmp_path / "d"))
    inserted = LabelledScan.inserted(tmp_path / "d")
    assert read_scan(inserted.scan).geometry.voxel_mm3 == pytest.approx(np.prod(spacing))


def test_padding_in_the_liver_mask_is_refused(healthy: LabelledScan, tmp_path: Path) -> None:
    assert healthy.label is not None
    image, label = nibabel.load(healthy.scan), np.asarray(nibabel.load(healthy.label).dataobj)
    hu = np.asarray(image.dataobj).astype(np.float32)
    hu[:3, :4] = np.nan
    nibabel.save(nibabel.Nifti1Image(hu, image.affine), tmp_path / "scan.nii.gz")
    prepare_case(replace(healthy, scan=tmp_path / "scan.nii.gz"), PREPROCESS, _folder(tmp_path / "a"), training=False)
    facts = json.loads((tmp_path / "a" / "case.json").read_text(encoding="utf-8"))
    count = 3 * 4 * hu.shape[2]
    assert f"voxels outside the body that are NaN or infinite count as air: {count}" in facts["warnings"]
    label[0, 0, 5] = 6
    nibabel.save(nibabel.Nifti1Image(label, image.affine), tmp_path / "label.nii.gz")
    case = replace(healthy, scan=tmp_path / "scan.nii.gz", label=tmp_path / "label.nii.gz")
    with pytest.raises(InputError, match="voxels of the liver mask are NaN, infinite or padding"):
        prepare_case(case, PREPROCESS, _folder(tmp_path / "b"), training=False)


def test_case_without_truth_cannot_be_evaluated(healthy: LabelledScan, tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", slices=1)
    with pytest.raises(InputError, match="no tumour label"):
        evaluate_case(healthy, prepared, tmp_path, EvaluationSettings(), tmp_path)


@pytest.mark.data
def test_real_scan_has_the_facts_known_of_it(real_data: Path, tmp_path: Path) -> None:
    """LiTS volume-17 has 118 planes, 113 with liver and 36 with tumour, and two tumours of 164 mL in total."""
    data = DatasetSettings(root=str(real_data / "liver" / "lits"), layout="lits")
    (found,), _ = find_cases(data)
    case = LabelledScan.of(found, data)
    prepare_case(case, PreprocessSettings(), tmp_path, training=False)
    facts = json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))
    assert (facts["planes"], facts["slices"]) == (118, 113)
    assert facts["liver_median_hu"] == pytest.approx(102, abs=8)
    labels = read_labels(case.label or tmp_path)
    tumour = labels.values == 2
    assert np.count_nonzero(tumour.any((0, 1))) == 36
    assert np.count_nonzero(tumour) * labels.geometry.voxel_mm3 / 1000 == pytest.approx(164, abs=1)
    slices = load_prepared(tmp_path / "prepared.safetensors").slices
    assert mask_to_slices(tumour, slices).any((1, 2)).sum() == 36


@pytest.mark.data
def test_real_training_cases_are_healthy(real_data: Path, tmp_path: Path) -> None:
    data = DatasetSettings(root=str(real_data / "liver" / "btcv"), layout="btcv")
    cases, problems = find_cases(data)
    assert [case.id for case in cases] == ["btcv-0001", "btcv-0013", "btcv-0101", "btcv-0102"]
    assert not problems
    slices = []
    for case in cases:
        prepare_case(LabelledScan.of(case, data), PREPROCESS, _folder(tmp_path / case.id), training=True)
        slices.append(json.loads((tmp_path / case.id / "case.json").read_text(encoding="utf-8"))["slices"])
    assert slices[2:] == [42, 20]
    assert all(0 < count <= 11 for count in slices[:2])


def test_evaluation_follows_the_affine_the_settings_chose(
    ill: LabelledScan, model: Model[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sform and qform mirrored and `qform` chosen, a perfect answer is still evaluated as perfect."""
    from medad.networks.infer import Networks, Prediction

    paths = {}
    for name, source in (("scan", ill.scan), ("label", ill.label)):
        image = nibabel.load(source)
        mirrored = image.affine.copy()
        mirrored[0] *= -1
        image.set_sform(mirrored, code=1)
        image.set_qform(nibabel.load(source).affine, code=1)
        paths[name] = tmp_path / f"{name}.nii.gz"
        nibabel.save(image, paths[name])
    case = LabelledScan(paths["scan"], paths["label"], (1, 2), 2, affine_from="qform")
    prepared, out, judged = (_folder(tmp_path / name) for name in ("prepared", "out", "judged"))
    prepare_case(case, PREPROCESS, prepared, training=False)
    ready = load_prepared(prepared / "prepared.safetensors").slices
    truth = read_labels(paths["label"], affine_from="qform").values == 2
    known = mask_to_slices(truth, ready).astype(np.float32)

    def oracle(pixels: np.ndarray, networks: Networks, batch_size: int, *, flips: bool) -> Prediction:
        return Prediction(known, pixels)

    monkeypatch.setattr("medad.steps.predict.predict", oracle)
    segment_case(prepared, model, InferenceSettings(), PostprocessSettings(), "cpu", out)
    evaluate_case(case, prepared, out, EvaluationSettings(), judged)
    metrics = CaseEvaluation.load(judged).metrics
    assert metrics.dice_3d > 0.75
    assert metrics.found_lesions == metrics.true_lesions
