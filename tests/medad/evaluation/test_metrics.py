"""Metrics against literal O(n^2) references, general laws, and cases computed by hand. Many inputs have ties."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medad.base.errors import InputError
from medad.config.liver import EvaluationSettings
from medad.evaluation.metric_rows import definitions
from medad.evaluation.metrics import (
    METRICS_FILE,
    SCORES_FILE,
    CaseEvaluation,
    LogitHistogram,
    Summary,
    auroc,
    dice,
    dice_of_counts,
    evaluate,
    summarise,
)

Array = np.ndarray[Any, Any]

OVERLAP = EvaluationSettings(lesion_overlap=0.3)
few_values = st.sampled_from([0.0, 1e-9, 0.1, 0.25, 0.5, 0.75, 1.0 - 2**-24, 1.0])


@st.composite
def scored(draw: st.DrawFn, elements: st.SearchStrategy[float] = few_values) -> tuple[Array, Array]:
    n = draw(st.integers(0, 40))
    return draw(hnp.arrays(np.float64, n, elements=elements)), draw(hnp.arrays(bool, n))


@st.composite
def volumes(draw: st.DrawFn) -> dict[str, Array]:
    """Draw truth, prediction, probability and liver on one small grid."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=4))
    liver = draw(hnp.arrays(bool, shape))
    prediction = draw(hnp.arrays(bool, shape)) & liver
    truth = draw(hnp.arrays(bool, shape)) & liver
    probability = draw(hnp.arrays(np.float64, shape, elements=few_values)).astype(np.float32)
    return {"truth": truth, "prediction": prediction, "probability": probability, "liver": liver}


def run(case: dict[str, Array], name: str = "c", overlap: EvaluationSettings = OVERLAP) -> CaseEvaluation:
    side = max(case["truth"].shape[:2])
    padded = {
        key: np.pad(volume, [(0, side - volume.shape[0]), (0, side - volume.shape[1]), (0, 0)]).transpose(2, 0, 1)
        for key, volume in case.items()
    }
    return evaluate(
        name,
        **case,
        voxel_mm3=2.0,
        slice_truth=padded["truth"],
        slice_prediction=padded["prediction"],
        slice_probability=padded["probability"],
        slice_organ=padded["liver"],
        settings=overlap,
    )


def auroc_by_definition(scores: Array, truth: Array) -> float | None:
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[truth].tolist() for n in scores[~truth].tolist()]
    return sum(wins) / len(wins) if wins else None


def empty_case(shape: tuple[int, int, int] = (4, 4, 4)) -> dict[str, Array]:
    return {
        "truth": np.zeros(shape, bool),
        "prediction": np.zeros(shape, bool),
        "probability": np.zeros(shape, np.float32),
        "liver": np.ones(shape, bool),
    }


# ---------------------------------------------------------------- AUROC


@given(scored())
def test_auroc_is_the_definition(case: tuple[Array, Array]) -> None:
    expected = auroc_by_definition(*case)
    got = auroc(*case)
    assert got == (None if expected is None else pytest.approx(expected, abs=1e-15))


@given(scored())
def test_auroc_ignores_monotone_maps_and_order(case: tuple[Array, Array]) -> None:
    scores, truth = case
    # ranks are a strictly increasing map without rounding errors
    ranks = np.unique(scores, return_inverse=True)[1].astype(np.float64)
    assert auroc(ranks, truth) == auroc(scores, truth)
    assert auroc(8.0 * scores, truth) == auroc(scores, truth)
    assert auroc(scores[::-1], truth[::-1]) == auroc(scores, truth)


@given(scored())
def test_auroc_of_the_opposite_question_is_the_complement(case: tuple[Array, Array]) -> None:
    scores, truth = case
    value = auroc(scores, truth)
    for opposite in (auroc(-scores, truth), auroc(scores, ~truth)):
        assert opposite == (None if value is None else pytest.approx(1 - value, abs=1e-15))


def test_auroc_known_values() -> None:
    truth = np.array([False, False, True, True])
    assert auroc(np.array([0.1, 0.2, 0.3, 0.4]), truth) == 1.0
    assert auroc(np.array([0.4, 0.3, 0.2, 0.1]), truth) == 0.0
    assert auroc(np.array([0.5, 0.5, 0.5, 0.5]), truth) == 0.5
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), truth) == 0.75
    assert auroc(np.array([-math.inf, 0.0, 0.0, math.inf]), truth) == 0.875
    assert auroc(np.array([0.1, 0.2]), np.array([True, True])) is None
    assert auroc(np.array([]), np.array([], dtype=bool)) is None


def test_auroc_of_two_gaussians() -> None:
    # for two unit normal distributions at distance d, P(a > b) = Phi(d / sqrt 2)
    rng = np.random.default_rng(5)
    scores = np.concatenate([rng.normal(1.0, 1.0, 200_000), rng.normal(0.0, 1.0, 300_000)])
    truth = np.arange(500_000) < 200_000
    assert auroc(scores, truth) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.003)


def test_auroc_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        auroc(np.array([0.1, math.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match="NaN"):
        LogitHistogram.from_probabilities(np.array([0.1, math.nan]), np.array([True, False]))


# ---------------------------------------------------------------- pooled histograms


@given(scored(st.floats(0.0, 1.0)))
def test_histogram_auroc_is_within_its_own_resolution(case: tuple[Array, Array]) -> None:
    histogram = LogitHistogram.from_probabilities(*case)
    exact, resolution = auroc(*case), histogram.resolution()
    if exact is None:
        assert histogram.auroc() is None
        assert resolution is None
    else:
        assert resolution is not None
        assert histogram.auroc() == pytest.approx(exact, abs=resolution + 1e-15)


def test_histogram_resolves_smooth_scores() -> None:
    rng = np.random.default_rng(6)
    logit = np.concatenate([rng.normal(-1.0, 2.0, 30_000), rng.normal(-4.0, 2.0, 60_000)])
    scores, truth = 1 / (1 + np.exp(-logit)), np.arange(90_000) < 30_000
    histogram = LogitHistogram.from_probabilities(scores, truth)
    assert (histogram.resolution() or 1) < 1e-4
    assert histogram.auroc() == pytest.approx(auroc(scores, truth), abs=1e-4)


@given(scored(), scored())
def test_histograms_merge_like_their_voxels(first: tuple[Array, Array], second: tuple[Array, Array]) -> None:
    merged = LogitHistogram.from_probabilities(*first) + LogitHistogram.from_probabilities(*second)
    together = LogitHistogram.from_probabilities(
        np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
    )
    np.testing.assert_array_equal(merged.tumour, together.tumour)
    np.testing.assert_array_equal(merged.healthy, together.healthy)


def test_histogram_counts_do_not_overflow() -> None:
    tumour, healthy = LogitHistogram.empty().tumour, LogitHistogram.empty().healthy
    tumour[[100, 200]] = 2 * 10**10
    healthy[[50, 150]] = 2 * 10**10
    assert LogitHistogram(tumour, healthy).auroc() == 0.75


# ---------------------------------------------------------------- Dice


@given(volumes())
def test_dice_is_the_definition_symmetric_and_defined_when_empty(case: dict[str, Array]) -> None:
    a, b = case["truth"], case["prediction"]
    first, second = set(np.flatnonzero(a).tolist()), set(np.flatnonzero(b).tolist())
    expected = 2 * len(first & second) / (len(first) + len(second)) if first or second else 1.0
    assert dice(a, b) == dice(b, a) == expected
    assert dice(a, a) == 1.0


def test_dice_of_empty_masks() -> None:
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    assert dice(empty, empty) == 1.0
    assert dice(empty, full) == 0.0
    assert dice_of_counts(0, 0, 0) is None
    assert dice_of_counts(0, 3, 0) == 0.0


def test_dice_refuses_other_shapes() -> None:
    with pytest.raises(Exception, match=r"(?s)shape"):
        dice(np.zeros((2, 2), bool), np.zeros((2, 3), bool))


# ---------------------------------------------------------------- a case


def test_case_known_by_hand() -> None:
    case = empty_case((12, 12, 6))
    case["liver"][:, :, 5] = False
    # lesion A: 10 voxels, 3 of them predicted = exactly 30 %; lesion B: 10 voxels, 2 predicted; lesion C: missed
    case["truth"][0:10, 0, 0] = True
    case["truth"][0:10, 4, 0] = True
    case["truth"][0:2, 8, 3] = True
    case["prediction"][0:3, 0, 0] = True
    case["prediction"][0:2, 4, 0] = True
    # a false positive of 4 voxels, and one that touches lesion C but shares no voxel with it
    case["prediction"][8:12, 11, 2] = True
    case["prediction"][2, 9, 3] = True
    case["probability"][case["prediction"]] = 0.9
    case["probability"][0, 8, 3] = 0.4
    # outside the liver: must not count
    case["probability"][:, :, 5] = 1.0
    metrics = run(case).metrics
    assert (metrics.true_lesions, metrics.found_lesions) == (3, 1)
    assert (metrics.predicted_lesions, metrics.false_positives) == (4, 2)
    assert (metrics.slice_tp_px, metrics.slice_fp_px, metrics.slice_fn_px) == (5, 5, 17)
    assert metrics.dice_3d == metrics.micro_dice_2d == 10 / 32
    assert (metrics.true_mm3, metrics.predicted_mm3) == (44.0, 20.0)
    np.testing.assert_allclose(metrics.slice_scores, [0.9, 0.0, 0.9, 0.9, 0.0, 0.0], atol=1e-7)
    assert metrics.slice_truth == (True, False, False, True, False, False)
    # slice pairs: 2 with tumour x 4 without; each score of 0.9 beats three and ties with one
    assert metrics.slice_auroc == (2 * 3 + 2 * 0.5) / 8
    # voxels: tumour 5 at 0.9, 1 at 0.4, 16 at 0; healthy 5 at 0.9, the rest of 5 x 144 at 0
    healthy = 5 * 144 - 22
    wins = 5 * (healthy - 5 + 2.5) + 1 * (healthy - 5) + 16 * 0.5 * (healthy - 5)
    assert metrics.voxel_auroc == pytest.approx(wins / (22 * healthy), abs=1e-15)


def test_overlap_of_exactly_the_limit_counts_for_every_tenth() -> None:
    for tenths in range(1, 11):
        case = empty_case((10, 1, 1))
        case["truth"][:] = True
        case["prediction"][:tenths] = True
        assert run(case, overlap=EvaluationSettings(lesion_overlap=tenths / 10)).metrics.found_lesions == 1
        case["prediction"][tenths - 1] = False
        assert run(case, overlap=EvaluationSettings(lesion_overlap=tenths / 10)).metrics.found_lesions == 0


def test_empty_masks_follow_the_documented_rules() -> None:
    nothing = run(empty_case()).metrics
    assert (nothing.dice_3d, nothing.micro_dice_2d, nothing.voxel_auroc, nothing.slice_auroc) == (1.0, None, None, None)
    case = empty_case()
    case["prediction"][0, 0, 0] = True
    false_alarm = run(case).metrics
    assert (false_alarm.dice_3d, false_alarm.micro_dice_2d, false_alarm.false_positives) == (0.0, 0.0, 1)
    case = empty_case()
    case["truth"][0, 0, 0] = True
    missed = run(case).metrics
    assert (missed.dice_3d, missed.micro_dice_2d, missed.voxel_auroc) == (0.0, 0.0, 0.5)
    text = definitions(OVERLAP)
    assert "both empty, the case counts as 1" in text["dice_3d_mean"]
    assert "Undefined if truth and prediction are both empty" in text["micro_dice_2d"]
    assert "30%" in text["lesion_sensitivity"]
    assert set(text) <= set(Summary.model_fields)


def test_a_case_without_slices_or_liver_is_defined() -> None:
    case = empty_case((3, 3, 2))
    none = np.zeros((0, 3, 3), bool)
    case["liver"][:] = False
    metrics = evaluate(
        "c",
        **case,
        voxel_mm3=1.0,
        slice_truth=none,
        slice_prediction=none,
        slice_probability=none.astype(np.float32),
        slice_organ=none,
        settings=OVERLAP,
    ).metrics
    assert (metrics.slice_scores, metrics.slice_auroc, metrics.voxel_auroc) == ((), None, None)


@given(volumes(), st.sampled_from([0, 1, 2]))
def test_a_mirrored_volume_gives_the_same_metrics(case: dict[str, Array], axis: int) -> None:
    plain = run(case)
    mirrored = run({key: np.flip(volume, axis) for key, volume in case.items()})
    ignored: dict[str, Any] = {"slice_scores": (), "slice_truth": ()}
    assert plain.metrics.model_copy(update=ignored) == mirrored.metrics.model_copy(update=ignored)
    assert plain.metrics.slice_auroc == mirrored.metrics.slice_auroc
    np.testing.assert_array_equal(plain.histogram.tumour, mirrored.histogram.tumour)


@given(volumes())
def test_a_perfect_prediction_is_perfect(case: dict[str, Array]) -> None:
    case["prediction"] = case["truth"]
    case["probability"] = case["truth"].astype(np.float32)
    metrics = run(case, overlap=EvaluationSettings(lesion_overlap=1.0)).metrics
    assert metrics.dice_3d == 1.0
    assert metrics.found_lesions == metrics.true_lesions == metrics.predicted_lesions
    assert metrics.false_positives == 0
    assert metrics.voxel_auroc in (None, 1.0)
    assert metrics.slice_auroc in (None, 1.0)


# ---------------------------------------------------------------- over cases


@given(st.lists(volumes(), max_size=6), st.randoms(use_true_random=False))
def test_summary_is_the_definition_and_ignores_the_order(cases: list[dict[str, Array]], shuffle: random.Random) -> None:
    done = [run(case, f"case-{i}") for i, case in enumerate(cases)]
    summary = summarise(done)
    shuffled = list(done)
    shuffle.shuffle(shuffled)
    assert summarise(shuffled) == summary

    truth = np.concatenate([np.zeros(0, bool)] + [case["truth"].ravel() for case in cases])
    prediction = np.concatenate([np.zeros(0, bool)] + [case["prediction"].ravel() for case in cases])
    both = np.count_nonzero(truth) + np.count_nonzero(prediction)
    expected = 2 * np.count_nonzero(truth & prediction) / both if both else None
    assert summary.micro_dice_2d == expected
    scores = np.concatenate([np.zeros(0, np.float32)] + [case["probability"][case["liver"]] for case in cases])
    exact = auroc_by_definition(scores, np.concatenate([np.zeros(0, bool)] + [c["truth"][c["liver"]] for c in cases]))
    if exact is None:
        assert summary.voxel_auroc_pooled is None
    else:
        assert summary.voxel_auroc_pooled == pytest.approx(
            exact, abs=(summary.voxel_auroc_pooled_resolution or 0) + 1e-15
        )
    if len(done) > 1:
        dices = np.array([dice(case["truth"], case["prediction"]) for case in cases])
        assert summary.dice_3d_mean == pytest.approx(dices.mean(), abs=1e-15)
        assert summary.dice_3d_sd == pytest.approx(dices.std(ddof=1), abs=1e-12)


def test_summary_of_nothing_and_of_one() -> None:
    nothing = summarise([])
    assert nothing.cases == 0
    figures = (nothing.micro_dice_2d, nothing.dice_3d_mean, nothing.slice_auroc, nothing.false_positives_per_case)
    assert figures == (None, None, None, None)
    one = summarise([run(empty_case())])
    assert (one.dice_3d_mean, one.dice_3d_sd, one.lesion_sensitivity) == (1.0, None, None)


def test_summary_counts_lesions_over_cases() -> None:
    hit, missed = empty_case(), empty_case()
    hit["truth"][0, 0, 0] = hit["prediction"][0, 0, 0] = True
    missed["truth"][0, 0, 0] = missed["truth"][3, 3, 3] = True
    missed["prediction"][0, 3, 0] = True
    summary = summarise([run(hit, "a"), run(missed, "b")])
    assert (summary.lesion_sensitivity, summary.false_positives_per_case) == (1 / 3, 0.5)


# ---------------------------------------------------------------- files


@settings(max_examples=25)
@given(volumes())
def test_files_hold_everything(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Array]) -> None:
    folder = tmp_path_factory.mktemp("evaluated")
    evaluation = run(case)
    evaluation.save(folder)
    again = CaseEvaluation.load(folder)
    assert again.metrics == evaluation.metrics
    np.testing.assert_array_equal(again.histogram.tumour, evaluation.histogram.tumour)
    np.testing.assert_array_equal(again.histogram.healthy, evaluation.histogram.healthy)
    first = [(folder / name).read_bytes() for name in (METRICS_FILE, SCORES_FILE)]
    again.save(folder)
    assert [(folder / name).read_bytes() for name in (METRICS_FILE, SCORES_FILE)] == first


@pytest.mark.parametrize("name", [METRICS_FILE, SCORES_FILE])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x00" * 40])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    run(empty_case()).save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        CaseEvaluation.load(tmp_path)


def test_metrics_that_contradict_themselves_are_refused() -> None:
    metrics = run(empty_case()).metrics
    with pytest.raises(ValueError, match="more lesions"):
        type(metrics).model_validate({**metrics.model_dump(), "found_lesions": 1})
    with pytest.raises(ValueError, match="equal length"):
        type(metrics).model_validate({**metrics.model_dump(), "slice_truth": ()})


def test_evaluation_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run(empty_case()).metrics = None  # type: ignore[misc, assignment]
