"""Liver report from folders with known content: its text, its JSON, its slices and its curves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medad.base.errors import CaseFailure
from medad.config.liver import DatasetSettings, InsertSettings
from medad.evaluation.metrics import CaseEvaluation, dice, summarise
from medad.reports.run.document import CURVE_POINTS
from medad.reports.run.shown_slices import RANK_TITLES, pick_slices
from tests.medad.report_cases import Report, liver_settings, write_case, write_curve


def test_json_holds_what_the_steps_measured(report: Report, tmp_path: Path) -> None:
    results = [write_case(tmp_path, f"lits-{n}", seed=n) for n in (10, 2)]
    done = report(
        results,
        [CaseFailure("lits-5", "prepare", "the gzip stream ends early", "volume-5.nii.gz")],
        restoration=write_curve(tmp_path / "r", "restoration", [0.5, 0.25]),
        segmentation=write_curve(tmp_path / "s", "segmentation", [0.1]),
        notes=["Three scans."],
    )
    document = done.json
    assert list(document) == [
        "schema_version",
        "kind",
        "name",
        "statement",
        "inserted",
        "notes",
        "headline",
        "summary",
        "definitions",
        "cases",
        "failures",
        "curves",
        "settings",
        "versions",
    ]
    assert document["schema_version"] == 1
    assert [case["case_id"] for case in document["cases"]] == ["lits-2", "lits-10"]
    evaluations = [CaseEvaluation.load(result.evaluated) for result in results if result.evaluated]
    assert document["summary"] == json.loads(summarise(evaluations).model_dump_json())
    for case, result in zip(document["cases"], reversed(results), strict=True):
        assert result.segmented is not None
        assert case["lesions"] == json.loads((result.segmented / "lesions.json").read_text(encoding="utf-8"))
        assert result.evaluated is not None
        assert case["metrics"] == json.loads((result.evaluated / "metrics.json").read_text(encoding="utf-8"))
        assert case["facts"]["liver_median_hu"] == 101.5
        assert case["seconds"] == {"total_seconds": 4.5}
    assert document["failures"] == [
        {"case_id": "lits-5", "stage": "prepare", "rule": "the gzip stream ends early", "file": "volume-5.nii.gz"}
    ]
    assert [(curve["phase"], curve["loss"]) for curve in document["curves"]] == [
        ("restoration", [0.5, 0.25]),
        ("segmentation", [0.1]),
    ]
    assert document["settings"]["postprocess"] == {
        "threshold": 0.5,
        "false_positive_ml": 5.0,
        "outline_share": 1.0,
        "auto_range": [0.35, 0.5],
        "min_lesion_mm3": 0.0,
    }


def test_page_shows_what_the_json_holds(report: Report, tmp_path: Path) -> None:
    done = report(
        [write_case(tmp_path, "lits-2"), write_case(tmp_path, "lits-3", truth=False, warnings=["affines differ"])],
        [CaseFailure("lits-5", "prepare", "the gzip stream ends early", "volume-5.nii.gz")],
        restoration=write_curve(tmp_path / "r", "restoration", [0.5, 0.25]),
        versions={"torch": "2.99.1"},
        notes=["Three scans."],
    )
    words, summary = done.page.words, done.json["summary"]
    for figure in ("micro_dice_2d", "dice_3d_mean", "voxel_auroc_mean", "slice_auroc", "lesion_sensitivity"):
        assert f"{summary[figure]:.3f}" in words
    for text in (*done.json["statement"], *done.json["definitions"].values(), "Three scans.", "affines differ"):
        assert text in words
    assert "No tumour label was used for training" in words
    assert "Not a medical device" in words
    assert "lits-5 prepare volume-5.nii.gz the gzip stream ends early" in words
    assert "torch 2.99.1" in words
    assert "slice_px: 256" in words
    assert "no ground truth" in words
    assert "nserted" not in words
    for case in done.json["cases"]:
        if case["metrics"]:
            both = f"3-D Dice {case['metrics']['dice_3d']:.3f}, micro 2-D Dice {case['micro_dice_2d']:.3f},"
            assert both in words, "the two Dice values are always shown together"
        for lesion in case["lesions"]["lesions"]:
            assert f"{lesion['diameter_mm']:.1f}" in words
            assert ", ".join(f"{value:.1f}" for value in lesion["centroid_ras_mm"]) in words
        for shown in case["shown_slices"]:
            assert f"{RANK_TITLES[shown['rank']]}, z = {shown['z']}" in words
    pictures_shown = sum(len(case["shown_slices"]) for case in done.json["cases"])
    assert len(done.page.images) == pictures_shown + 1


def test_best_median_and_worst_slices_are_the_known_ones(report: Report, tmp_path: Path) -> None:
    # prediction and truth are equal in slice 3 and differ more and more up to slice 6; slice 8 is a false positive
    (case,) = report([write_case(tmp_path, "a")]).json["cases"]
    assert [(one["rank"], one["z"]) for one in case["shown_slices"]] == [("best", 3), ("median", 5), ("worst", 8)]
    assert case["shown_slices"][0]["dice"] == 1.0
    assert case["shown_slices"][2] == {
        "rank": "worst",
        "z": 8,
        "dice": 0.0,
        "true_px": 0,
        "predicted_px": 9,
        "max_probability": pytest.approx(0.9, abs=1e-6),
    }


def test_inserted_lesions_are_said_at_the_top_in_the_heading_and_in_the_json(report: Report, tmp_path: Path) -> None:
    lesion = {"centre_voxel": [10, 11, 4], "diameter_mm": 17.25, "contrast_hu": -51.5, "volume_mm3": 2687.5}
    done = report([write_case(tmp_path, "demo", inserted=[lesion]), write_case(tmp_path, "real")])
    assert done.page.words.index("Inserted lesions, real CT.") < done.page.words.index("Micro 2-D Dice")
    assert "Cases with inserted lesions: demo." in done.page.words
    assert "demo inserted lesions, real CT" in done.page.headings
    assert "real" in done.page.headings
    assert "17.2" in done.page.words
    assert "-51.5" in done.page.words
    assert done.json["inserted"]["any"] is True
    assert done.json["inserted"]["cases"] == ["demo"]
    assert "not an estimate for real tumours" in done.json["inserted"]["statement"]
    assert [case["inserted"] for case in done.json["cases"]] == [True, False]
    assert done.json["cases"][0]["inserted_lesions"] == [lesion]


def test_insertion_is_stated_even_when_every_case_failed(report: Report) -> None:
    data = DatasetSettings(root="samples:dicom", layout="lits", insert=InsertSettings())
    done = report([], [CaseFailure("a", "insert", "no liver", "")], settings=liver_settings(test_data=data))
    assert "Inserted lesions, real CT." in done.page.words
    assert done.json["inserted"]["any"] is True


def test_nothing_succeeded(report: Report) -> None:
    done = report([], [CaseFailure("lits-1", "prepare", "no liver in this label", "segmentation-1.nii")])
    assert "No case was segmented." in done.page.words
    assert "no liver in this label" in done.page.words
    assert (done.json["summary"], done.json["cases"]) == (None, [])
    assert not (done.folder / "preview.png").exists()
    assert "No case was segmented." in report().page.words


def test_without_truth_nothing_is_claimed(report: Report, tmp_path: Path) -> None:
    done = report([write_case(tmp_path, "new", truth=False)])
    assert "the quality of the masks is not known" in done.page.words
    assert done.json["summary"] is None
    (case,) = done.json["cases"]
    assert case["metrics"] is None
    assert [one["rank"] for one in case["shown_slices"]] == ["highest", "median", "lowest"]
    assert {one["dice"] for one in case["shown_slices"]} == {None}


def test_a_case_without_any_lesion(report: Report, tmp_path: Path) -> None:
    done = report([write_case(tmp_path, "clean", lesions=False)])
    assert "No lesion predicted" in done.page.words
    assert done.json["cases"][0]["lesions"]["status"] == "no lesion"
    assert done.json["summary"]["dice_3d_mean"] == 1.0
    assert "undefined" in done.page.words
    assert len(done.json["cases"][0]["shown_slices"]) == 3


def test_a_cached_evaluation_appears_under_the_case_that_used_it(report: Report, tmp_path: Path) -> None:
    first = write_case(tmp_path, "first")
    done = report([first, dataclasses.replace(first, case_id="second")])
    assert [case["metrics"]["case_id"] for case in done.json["cases"]] == ["first", "second"]


@given(st.data(), st.integers(0, 7))
def test_picked_slices_are_the_extremes_and_the_middle(data: st.DataObject, n: int) -> None:
    truth = data.draw(hnp.arrays(bool, (n, 2, 2)))
    prediction = data.draw(hnp.arrays(bool, (n, 2, 2)))
    picked = pick_slices(truth, prediction, [0.5] * n)
    compared = [i for i in range(n) if truth[i].any() or prediction[i].any()]
    values = sorted(dice(truth[i], prediction[i]) for i in compared)
    got = dict(picked)
    assert len({index for _, index in picked}) == len(picked) == min(3, len(compared) or n)
    if not compared:
        assert set(got) <= {"highest", "median", "lowest"}
        return
    assert dice(truth[got["best"]], prediction[got["best"]]) == values[-1]
    if len(compared) > 1:
        assert dice(truth[got["worst"]], prediction[got["worst"]]) == values[0]
    if len(compared) > 2:
        middle = dice(truth[got["median"]], prediction[got["median"]])
        assert sum(value <= middle for value in values) >= len(values) // 2
        assert sum(value >= middle for value in values) >= len(values) // 2


def test_slices_without_truth_go_by_area_then_probability() -> None:
    prediction = np.zeros((5, 4, 4), dtype=bool)
    prediction[1, 0, :3] = True
    prediction[3, 0, :1] = True
    assert pick_slices(None, prediction, [0.2, 0.9, 0.4, 0.6, 0.1]) == [("highest", 1), ("median", 2), ("lowest", 4)]


def test_long_curves_are_averaged_and_short_ones_kept(report: Report, tmp_path: Path) -> None:
    loss = (1.0 / (1.0 + np.arange(20 * CURVE_POINTS))).tolist()
    done = report(
        restoration=write_curve(tmp_path / "r", "restoration", loss),
        segmentation=write_curve(tmp_path / "s", "segmentation", [0.3, 0.0, 0.1]),
    )
    long, short = done.json["curves"]
    assert len(long["steps"]) == len(long["loss"]) == CURVE_POINTS
    assert long["loss"][0] == pytest.approx(np.mean(loss[:20]), rel=1e-12)
    assert np.mean(long["loss"]) == pytest.approx(np.mean(loss), rel=1e-12)
    assert long["steps"][:2] == [9.5, 29.5]
    assert short["loss"] == [0.3, 0.0, 0.1]
    assert "Training" in done.page.headings
