"""Liver report: self-contained, private, repeatable, and strict about damaged results."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from medad.base.errors import CaseFailure, InputError
from medad.base.text import PLACEHOLDER
from medad.config.liver import DatasetSettings
from medad.reports.run.report import write_report
from tests.medad.report_cases import SIZE, Report, liver_settings, write_case, write_curve, write_json

HOSTILE = "<script>alert('x')</script> & \"quoted\""


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
    assert done.html.count("<script") == 1, "the kit's"
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


def test_a_curve_that_contradicts_itself_is_refused(report: Report, tmp_path: Path) -> None:
    folder = write_curve(tmp_path / "r", "restoration", [0.5])
    curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    write_json(folder / "curve.json", {**curve, "steps": [1, 2]})
    with pytest.raises(InputError, match=r"curve\.json: 2 steps but 1 losses"):
        report(restoration=folder)


def test_report_of_many_cases_stays_small(report: Report, tmp_path: Path) -> None:
    one = write_case(tmp_path, "a")
    few = report([dataclasses.replace(one, case_id=f"c-{n}") for n in range(2)])
    many = report([dataclasses.replace(one, case_id=f"c-{n}") for n in range(41)])
    # 130 cases at this size are below six megabytes, although noise is the worst case for JPEG
    assert len(many.html) / 41 < 45_000
    assert len(many.html) / 41 < 0.75 * len(few.html) / 2
    assert len(many.page.images) == 3 * 41
