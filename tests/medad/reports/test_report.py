"""Liver report from folders with known content: its text, its privacy, and its pictures."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors.numpy import save_file

from medad.base.errors import CaseFailure, InputError
from medad.base.text import PLACEHOLDER
from medad.config.liver import DatasetSettings, EvaluationSettings, InsertSettings, LiverSettings
from medad.evaluation.metrics import CaseEvaluation, dice, evaluate, summarise
from medad.evaluation.postprocess import lesion_table
from medad.reports import pictures
from medad.reports.run.document import (
    CURVE_POINTS,
)
from medad.reports.run.report import RANK_TITLES, pick_slices, write_report
from medad.steps.results import CaseResult
from tests.medad.prepared import save_slices
from tests.page import WrittenReport

Array = np.ndarray[Any, Any]

SIZE, DEPTH = 48, 10
AFFINE = np.diag([-1.5, -1.5, 3.0, 1.0])
HOSTILE = "<script>alert('x')</script> & \"quoted\""


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


@pytest.fixture
def report(tmp_path: Path) -> Report:
    def write(
        results: Sequence[CaseResult[Path]] = (), failures: Sequence[CaseFailure] = (), **changes: Any
    ) -> WrittenReport:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        out.mkdir()
        arguments: dict[str, Any] = {"settings": liver_settings(), "restoration": None, "segmentation": None}
        arguments |= {"versions": {"adflows": "0.1.0"}, "notes": []}
        write_report(out, results=results, failures=failures, **(arguments | changes))
        return WrittenReport(out)

    return write


def picture(uri: str | None) -> Array:
    assert uri is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


# ---------------------------------------------------------------- content


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


# ---------------------------------------------------------------- self-contained, safe, private, repeatable


def test_page_needs_nothing_from_outside(report: Report, tmp_path: Path) -> None:
    done = report(
        [write_case(tmp_path, "a"), write_case(tmp_path, "b")],
        restoration=write_curve(tmp_path / "r", "restoration", [0.5, 0.25]),
    )
    done.page.assert_self_contained()


def test_text_from_outside_stays_text(report: Report, tmp_path: Path) -> None:
    done = report(
        [write_case(tmp_path, "a", warnings=[HOSTILE])],
        [CaseFailure(HOSTILE, HOSTILE, HOSTILE, "x.nii")],
        notes=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        restoration=write_curve(tmp_path / "r", HOSTILE, [1.0, 0.5]),
        settings=liver_settings(test_data=DatasetSettings(root="samples:lits", layout="lits", cases=(HOSTILE,))),
    )
    assert "script" not in done.page.tags
    assert "<script" not in done.html
    assert done.page.words.count("alert('x')") >= 7


def test_no_path_and_no_free_text_goes_in(report: Report, tmp_path: Path) -> None:
    inserted = {"diameter_mm": 12.0, "note": "SMITH", "axes_mm": [1.0, 2.0], "names": ["SMITH"]}
    done = report(
        [write_case(tmp_path, "a", inserted=[inserted], warnings=["label /srv/SMITH/a.nii.gz moved by 0.3 mm/px"])],
        [
            CaseFailure("b", "prepare", "cannot read C:\\SMITH\\scan.nii (bad)", str(tmp_path / "SMITH" / "b.nii")),
            CaseFailure("c", "prepare", "see '\\\\server\\SMITH\\c.nii', ratio 1/2", ""),
        ],
        notes=["from ~/SMITH/x"],
        settings=liver_settings(
            train_data=DatasetSettings(root="SMITH/relative", layout="btcv"),
            test_data=DatasetSettings(root="/srv/SMITH", layout="lits"),
        ),
    )
    both = done.html + json.dumps(done.json)
    assert both.count("SMITH") == 0
    assert str(tmp_path) not in both
    assert done.json["cases"][0]["facts"]["warnings"] == [f"label {PLACEHOLDER} moved by 0.3 mm/px"]
    assert done.json["cases"][0]["inserted_lesions"] == [{"diameter_mm": 12.0, "axes_mm": [1.0, 2.0]}]
    assert [one["file"] for one in done.json["failures"]] == ["b.nii", ""]
    assert done.json["failures"][1]["rule"] == f"see '{PLACEHOLDER}', ratio 1/2"


def test_pseudonyms_hide_file_names_too(report: Report) -> None:
    data = DatasetSettings(root="x", layout="lits", pseudonyms=True)
    done = report(
        [], [CaseFailure("3fa9", "prepare", "truncated", "Smith.nii")], settings=liver_settings(test_data=data)
    )
    assert "Smith" not in done.html
    assert done.json["failures"][0]["file"] == ""


def test_equal_inputs_give_equal_bytes_in_any_order_and_place(report: Report, tmp_path: Path) -> None:
    def run(root: Path, reverse: bool) -> list[bytes]:
        results = [write_case(root, f"lits-{n}", seed=n) for n in (1, 2, 11)]
        failures = [CaseFailure(f"lits-{n}", "prepare", "bad", "") for n in (7, 8)]
        curve = write_curve(root / "r", "restoration", [0.5, 0.25])
        step = -1 if reverse else 1
        done = report(results[::step], failures[::step], restoration=curve)
        return [(done.folder / name).read_bytes() for name in ("report.html", "report.json", "preview.png")]

    assert run(tmp_path / "here", False) == run(tmp_path / "elsewhere", True)


@pytest.mark.parametrize(
    "damaged",
    [
        "prepared/case.json",
        "prepared/prepared.safetensors",
        "segmented/lesions.json",
        "segmented/slices.safetensors",
        "evaluated/metrics.json",
        "evaluated/scores.safetensors",
        "evaluated/truth.safetensors",
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_damaged_results_are_named_and_leave_nothing(
    report: Report, tmp_path: Path, damaged: str, content: bytes | None
) -> None:
    result = write_case(tmp_path, "a")
    path = tmp_path / "a" / damaged
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=path.name):
        report([result])
    assert not list((tmp_path / "out-0").iterdir())


def test_truth_of_another_shape_is_refused(report: Report, tmp_path: Path) -> None:
    result = write_case(tmp_path, "a")
    assert result.evaluated is not None
    save_file({"tumour": np.zeros((2, SIZE, SIZE), np.uint8)}, result.evaluated / "truth.safetensors")
    with pytest.raises(InputError, match="shape"):
        report([result])


def test_a_rewritten_report_replaces_the_old_one(report: Report, tmp_path: Path) -> None:
    done = report([write_case(tmp_path, "a")])
    names = sorted(path.name for path in done.folder.iterdir())
    assert names == ["preview.png", "report.html", "report.json"]
    shutil.rmtree(tmp_path / "a")
    write_report(
        done.folder,
        settings=liver_settings(),
        results=[write_case(tmp_path, "a")],
        failures=[],
        restoration=None,
        segmentation=None,
        versions={"adflows": "0.1.0"},
        notes=[],
    )
    assert sorted(path.name for path in done.folder.iterdir()) == names
    assert (done.folder / "report.html").read_text(encoding="utf-8") == done.html


# ---------------------------------------------------------------- slices and curves


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


@pytest.mark.parametrize("loss", [[], [0.0], [1e-7, 1e-7], [5.0]])
def test_odd_curves_are_drawn(loss: list[float]) -> None:
    curve = ("phase", [float(step) for step in range(len(loss))], loss)
    svg = pictures.curves_svg([curve])
    assert svg == pictures.curves_svg([curve])
    assert "<svg" in svg


def test_a_curve_that_contradicts_itself_is_refused(report: Report, tmp_path: Path) -> None:
    folder = write_curve(tmp_path / "r", "restoration", [0.5])
    curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    write_json(folder / "curve.json", {**curve, "steps": [1, 2]})
    with pytest.raises(InputError, match=r"curve\.json: 2 steps but 1 losses"):
        report(restoration=folder)


# ---------------------------------------------------------------- pictures


def view(**changes: Any) -> pictures.SliceView:
    organ = np.zeros((64, 64), dtype=bool)
    organ[10:50, 8:48] = True
    values: dict[str, Any] = {
        "pixels": np.where(organ, 120, 0).astype(np.uint8),
        "restored": np.where(organ, 120, 50).astype(np.uint8),
        "organ": organ,
        "probability": np.where(organ, 0.25, 0.9).astype(np.float32),
        "prediction": np.zeros_like(organ),
        "truth": np.zeros_like(organ),
    }
    return pictures.SliceView(**(values | changes))


def panels(one: pictures.SliceView, panel_px: int = 160) -> dict[str, Array]:
    crop = pictures.Crop(0, 0, 64)
    row = np.asarray(pictures.panel_row(one, crop, panel_px, px_mm=1.0)).astype(int)
    assert row.shape == (panel_px, pictures.row_width_px(panel_px), 3)
    pitch = (row.shape[1] - panel_px) // 4
    return {name: row[:, i * pitch : i * pitch + panel_px] for i, name in enumerate(pictures.PANELS)}


def drawn_in(panel: Array, colour: tuple[int, int, int]) -> Array:
    """Return where a grey panel has the hue of `colour`, even for thin lines."""
    red_to_blue = panel[:, :, 0] - panel[:, :, 2]
    found: Array = red_to_blue * np.sign(colour[0] - colour[2]) > 50
    return found


def test_patients_right_front_is_top_left() -> None:
    base = view()
    # columns run to the patient's left and rows to the back, so a low row and column is right and front
    base.pixels[14:20, 12:18] = 255
    grey = panels(base)["slice"][:, :, 0]
    rows, cols = np.nonzero(grey[30:130, 20:140] > 200)
    assert rows.mean() + 30 < 60
    assert cols.mean() + 20 < 60


def test_probability_has_one_scale_whatever_else_is_in_the_slice() -> None:
    alone = view()
    crowded = view()
    crowded.probability[30:40, 30:40] = 1.0
    here = panels(alone)["probability"][50, 40]
    np.testing.assert_array_equal(here, panels(crowded)["probability"][50, 40])
    bar = picture(pictures.colour_bar_uri())
    assert bar.shape == (1, 256, 3)
    np.testing.assert_array_equal(here, bar[0, round(0.25 * 255)])
    np.testing.assert_array_equal(panels(crowded)["probability"][87, 87], bar[0, 255])
    # 0.9 outside the organ is not shown
    assert (panels(alone)["probability"][:20] == 0).all()


def test_difference_and_restoration_are_shown_inside_the_organ_only() -> None:
    shifted = view()
    shifted.pixels[20:40, 20:40] = 120 + pictures.DIFFERENCE_LIMIT
    shifted.pixels[42:48, 10:46] = 120 - pictures.DIFFERENCE_LIMIT // 2
    shown = panels(shifted)
    assert (shown["difference"][75, 75] == 255).all()
    np.testing.assert_allclose(shown["difference"][112, 70], 127, atol=2)
    assert (shown["difference"][60, 28] == 0).all()
    assert (shown["difference"][:18] == 0).all()
    assert (shown["restoration"][:18] == 0).all()


def test_outlines_lie_on_the_masks_edge_solid_and_dashed() -> None:
    y, x = np.mgrid[:64, :64]
    disc = (x - 28) ** 2 + (y - 30) ** 2 <= 12**2
    solid = drawn_in(panels(view(prediction=disc))["outlines"], pictures.PREDICTION_RGB)
    dashed = drawn_in(panels(view(truth=disc))["outlines"], pictures.TRUTH_RGB)
    scale = 160 / 64
    for drawn in (solid, dashed):
        rows, cols = np.nonzero(drawn)
        radius = np.hypot(rows + 0.5 - 30.5 * scale, cols + 0.5 - 28.5 * scale)
        assert np.abs(radius - 12 * scale).max() < 1.5 * scale
    angles = [np.arctan2(*(np.argwhere(drawn) + 0.5 - (30.5 * scale, 28.5 * scale)).T) for drawn in (solid, dashed)]
    covered = [len(np.unique(np.floor((angle + np.pi) / (2 * np.pi) * 120))) / 120 for angle in angles]
    assert covered[0] == 1.0
    assert 0.3 < covered[1] < 0.8
    assert not drawn_in(panels(view(truth=None))["outlines"], pictures.TRUTH_RGB).any()


@given(hnp.arrays(bool, (12, 12)), st.integers(1, 12))
def test_crop_holds_the_organ_whatever_its_place(organ: Array, min_side: int) -> None:
    crop = pictures.crop_around(organ, min_side=min_side)
    assert crop.side >= min(min_side, 12)
    rows, cols = np.nonzero(organ)
    for places, start in ((rows, crop.row), (cols, crop.col)):
        if places.size:
            assert places.min() >= start
            assert places.max() < start + crop.side
    blank = np.zeros((12, 12), np.uint8)
    one = pictures.SliceView(blank, blank, organ, blank.astype(np.float32), organ, organ)
    assert pictures.panel_row(one, crop, 40, px_mm=0.8).size == (pictures.row_width_px(40), 40)


@pytest.mark.parametrize(("crop_side", "px_mm", "length_mm"), [(64, 1.0, 20), (128, 0.7, 20), (100, 4.0, 100)])
def test_scale_bar_has_the_length_it_says(crop_side: int, px_mm: float, length_mm: int) -> None:
    row = np.asarray(pictures.panel_row(view(), pictures.Crop(0, 0, crop_side), 200, px_mm=px_mm))
    bar = (row[195, :200] == 255).all(axis=1)
    assert np.count_nonzero(bar) == pytest.approx(length_mm * 200 / (crop_side * px_mm), abs=1.5)


def test_report_of_many_cases_stays_small(report: Report, tmp_path: Path) -> None:
    one = write_case(tmp_path, "a")
    few = report([dataclasses.replace(one, case_id=f"c-{n}") for n in range(2)])
    many = report([dataclasses.replace(one, case_id=f"c-{n}") for n in range(41)])
    # 130 cases at this size are below six megabytes, although noise is the worst case for JPEG
    assert len(many.html) / 41 < 45_000
    assert len(many.html) / 41 < 0.75 * len(few.html) / 2
    assert len(many.page.images) == 3 * 41
