"""The calibration of a model on phantoms: with maps that are known, and end to end with tiny networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from safetensors.numpy import save_file

from medad.anomalies.copies import COPIES, NO_SHIFT, write_copies
from medad.base.errors import ConfigError, InputError
from medad.config.anomalies import SolidLesionSettings
from medad.config.liver import InferenceSettings, NetSettings, PostprocessSettings
from medad.evaluation.calibration import THRESHOLDS, Calibration
from medad.networks import nets
from medad.slices.prepared_file import PreparedCase, load_prepared
from medad.steps.calibration import CALIBRATION, WHOLE_LIVER_ML, calibrate, load_calibration
from medad.steps.predict import CasePrediction, LoadedMember, load_members, predict_case
from medad.steps.results import LeftOut, Member
from tests.medad.prepared import save_slices
from tests.medad.trained_trees import write_dark_is_lesion

SIDE = 32
NET = NetSettings(widths=(8, 8, 8), groups=4)
BOTH = InferenceSettings.model_validate({"combine": {"segmentation": 0.5, "classifier": 0.5}})


def _organ() -> ndarray:
    organ = np.zeros((8, SIDE, SIDE), bool)
    organ[:, 6:26, 5:25] = True
    return organ


def _lesion() -> ndarray:
    mask = np.zeros(_organ().shape, bool)
    mask[2:6, 8:14, 8:14] = True
    return mask


def _case(folder: Path, seed: int = 0, copies: int = 2) -> Path:
    """Write a noisy liver with its facts, and copies with a dark cube."""
    noise = np.random.default_rng(seed).normal(0, 4, _organ().shape)
    pixels = np.where(_organ(), np.rint(128 + noise), 0).astype(np.uint8)
    save_slices(folder, pixels, _organ(), affine=np.diag([-2.0, -2.0, 3.0, 1.0]), grey_per_hu=0.85)
    (folder / "case.json").write_text(json.dumps({"liver_median_hu": 100.0 + seed}), encoding="utf-8")
    masks = np.stack([_lesion()] * copies)
    shift = np.where(masks, NO_SHIFT - 60, NO_SHIFT).astype(np.uint8)
    save_file({"shift": shift, "mask": np.packbits(masks, axis=-1)}, folder / COPIES)
    return folder


def _member(root: Path, seed: int = 1, *, trees: bool = False) -> Member[Path]:
    for role in nets.PHASES:
        (root / role).mkdir(parents=True)
        net = nets.build(role, NET, torch.Generator().manual_seed(seed))
        nets.save(root / role / "model.safetensors", net, role, NET)
    classifier = write_dark_is_lesion(root / "classifier") if trees else None
    return Member(root / "restoration", root / "segmentation", classifier)


def _calibrate(left_out: list[LeftOut[Path]], out: Path, inference: InferenceSettings | None = None) -> Calibration:
    out.mkdir()
    post = PostprocessSettings(threshold="calibrated", false_positive_ml=5.0)
    calibrate(left_out, inference or InferenceSettings(), post, out, device="cpu")
    return load_calibration(out)


@pytest.fixture
def known_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the model: lesions get 0.6, 8 healthy voxels 0.8, and the other voxels 0.1."""

    def predict(
        case: PreparedCase, members: Sequence[LoadedMember], settings: InferenceSettings, batch_size: int
    ) -> CasePrediction:
        pixels = case.slices.pixels
        probability = np.where(pixels < 100, 0.6, 0.1).astype(np.float32)
        probability[0, 8:10, 8:12] = 0.8
        return CasePrediction(np.where(case.slices.organ, probability, np.float32(0)), pixels)

    monkeypatch.setattr("medad.steps.calibration.predict_case", predict)


@pytest.mark.usefixtures("known_maps")
def test_the_threshold_of_known_maps_is_known(tmp_path: Path) -> None:
    """Between 0.1 and 0.6 the lesion and 8 healthy voxels of 3200 are marked, so the first such threshold wins."""
    cases = tuple(_case(tmp_path / str(seed), seed) for seed in (0, 1))
    found = _calibrate([LeftOut(_member(tmp_path / "m"), cases, cases)], tmp_path / "out")
    assert found.middle == pytest.approx(np.log(1 / 9), abs=1e-5)
    assert found.decided_by == "dice"
    assert 0.1 < found.threshold <= 0.121
    assert found.threshold in THRESHOLDS
    assert found.marked_ml == pytest.approx(WHOLE_LIVER_ML * 8 / 3200)
    lesion = np.count_nonzero(_lesion())
    assert found.dice == pytest.approx(2 * lesion / (2 * lesion + 8))
    assert (found.healthy_scans, found.copies) == (2, 4)
    assert [facts.liver_hu for facts in found.experience] == [100, 101]
    assert all(facts.plane_mm == 3 for facts in found.experience)


@pytest.mark.usefixtures("known_maps")
def test_less_allowed_volume_raises_the_threshold(tmp_path: Path) -> None:
    """Allow less than the 3.75 ml that 8 voxels are: only a threshold above 0.8 is left."""
    case = _case(tmp_path / "case")
    (tmp_path / "out").mkdir()
    post = PostprocessSettings(threshold="calibrated", false_positive_ml=1.0)
    left_out = [LeftOut(_member(tmp_path / "m"), (case,), (case,))]
    calibrate(left_out, InferenceSettings(), post, tmp_path / "out", device="cpu")
    found = load_calibration(tmp_path / "out")
    assert found.decided_by == "false positives"
    assert 0.8 < found.threshold <= 0.821
    assert found.marked_ml == 0


@pytest.mark.usefixtures("known_maps")
def test_a_case_without_a_lesion_in_any_copy_cannot_calibrate(tmp_path: Path) -> None:
    case = _case(tmp_path / "case")
    none = np.zeros((2, *_organ().shape), bool)
    save_file({"shift": np.full(none.shape, NO_SHIFT, np.uint8), "mask": np.packbits(none, axis=-1)}, case / COPIES)
    with pytest.raises(InputError, match="no copy of a healthy scan has a lesion"):
        _calibrate([LeftOut(_member(tmp_path / "m"), (case,), (case,))], tmp_path / "out")


def test_members_without_left_out_cases_are_skipped_and_none_at_all_is_refused(tmp_path: Path) -> None:
    member = _member(tmp_path / "m")
    with pytest.raises(InputError, match="no healthy scan was left out"):
        _calibrate([LeftOut(member, (), ())], tmp_path / "none")
    case = _case(tmp_path / "case")
    found = _calibrate([LeftOut(member, (), ()), LeftOut(member, (case,), (case,))], tmp_path / "out")
    assert found.healthy_scans == 1


def test_tiny_networks_and_trees_calibrate_from_end_to_end(tmp_path: Path) -> None:
    """Draw real copies, fewer than are wanted, and repeat: the file is the same, byte for byte."""
    left_out = []
    for seed in (0, 1):
        case, copies = _case(tmp_path / f"case{seed}", seed), tmp_path / f"copies{seed}"
        copies.mkdir()
        write_copies(case, SolidLesionSettings(copies=2, diameter_mm=(10, 16)), seed, copies)
        left_out.append(LeftOut(_member(tmp_path / f"m{seed}", seed, trees=True), (case,), (copies,)))
    found = _calibrate(left_out, tmp_path / "one", BOTH)
    assert found.threshold in THRESHOLDS
    assert 0 < found.dice <= 1
    assert (found.healthy_scans, found.copies) == (2, 4)
    _calibrate(left_out, tmp_path / "two", BOTH)
    assert (tmp_path / "one" / CALIBRATION).read_bytes() == (tmp_path / "two" / CALIBRATION).read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"threshold": "x"}'])
def test_a_missing_or_damaged_calibration_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / CALIBRATION).write_bytes(content)
    with pytest.raises(InputError, match="the calibration cannot be read"):
        load_calibration(tmp_path)


def test_a_models_map_is_the_mean_of_its_members_maps(tmp_path: Path) -> None:
    case = load_prepared(_case(tmp_path / "case") / "prepared.safetensors")
    members = [_member(tmp_path / f"m{seed}", seed, trees=True) for seed in (1, 2)]
    loaded = load_members(members, BOTH, "cpu")
    single = [predict_case(case, [each], BOTH, 4) for each in loaded]
    both = predict_case(case, loaded, BOTH, 4)
    assert np.allclose(both.probability, (single[0].probability + single[1].probability) / 2, atol=1e-6)
    assert np.array_equal(both.restored, single[0].restored)
    assert not np.allclose(single[0].probability, single[1].probability)


def test_a_classifier_counts_with_its_weight_and_is_needed_then(tmp_path: Path) -> None:
    case = load_prepared(_case(tmp_path / "case") / "prepared.safetensors")
    member = _member(tmp_path / "m", trees=True)

    def predicted(member: Member[Path], **combine: Any) -> ndarray:
        settings = InferenceSettings.model_validate({"combine": combine})
        found: ndarray = predict_case(case, load_members([member], settings, "cpu"), settings, 4).probability
        return found

    nets_only, trees_only = predicted(member), predicted(member, segmentation=0, classifier=1)
    mixed = predicted(member, segmentation=0.5, classifier=0.5)
    assert np.allclose(mixed, (nets_only + trees_only) / 2, atol=1e-6)
    without = Member(member.restoration, member.segmentation)
    assert np.array_equal(predicted(without), nets_only)
    with pytest.raises(ConfigError, match="the model has no voxel classifier"):
        predicted(without, segmentation=0.5, classifier=0.5)
