"""Report of an ablation on artificial results with known metrics."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from medad.base.errors import CaseFailure
from medad.base.text import PLACEHOLDER
from medad.config.ablation import AblationSettings
from medad.evaluation.metrics import CaseEvaluation, CaseMetrics, LogitHistogram
from medad.reports.ablation.document import AblationDocument
from medad.reports.ablation.report import write_ablation_report
from medad.reports.ablation.summary import paired_tables
from medad.steps.examples import EXAMPLES
from medad.steps.results import AblationResults, CaseResult, SnapshotResult, VariantResult
from tests.browser import assert_sound, needs_browser, opened
from tests.medad.prepared import SIDE, write_prepared
from tests.page import Page

SECRET = "/home/doe_jane/scans"
SETTINGS: dict[str, Any] = {
    "name": "mine",
    "seeds": [0, 1],
    "base": {
        "name": "x",
        "train_data": {"root": SECRET, "layout": "btcv"},
        "test_data": {"root": SECRET, "layout": "lits"},
    },
    "reference": "b",
    "rows": [
        {
            "name": "a",
            "label": "A & co",
            "set": {"test_data.root": SECRET},
            "published": {"dice_percent": 14.75, "dice_sd": 14.28, "source": "thesis, table 3.2"},
        },
        {"name": "b", "label": "B", "set": {"train.focal.gamma": 1}},
        {"name": "c", "label": "C, which fails"},
    ],
    "sweeps": [
        {
            "name": "th",
            "label": "Mask threshold",
            "key": "synthesis.threshold_grey",
            "values": [180, 200],
            "published": [None, {"dice_percent": 52.562, "auroc_percent": 75.854, "source": "thesis, table 3.3"}],
        }
    ],
    "curve": {"row": "b", "epochs": 2, "every": 1},
    "panels": 2,
    "published_rows": [{"label": "ASC-Net", "dice_percent": 32.24, "source": "thesis, table 3.1"}],
}
DICE = {"a": {0: (2, 4), 1: (4, 6)}, "b": {0: (6, 8), 1: (8, 8)}}
"""True positives of both cases by row and seed. Truth and prediction have ten pixels, so Dice = TP / 10."""


def evaluated(folder: Path, tp: int) -> Path:
    """Write a case with 2-D Dice, 3-D Dice and voxel AUROC of tp / 10."""
    folder.mkdir(parents=True)
    metrics = CaseMetrics(
        case_id="case",
        dice_3d=tp / 10,
        true_mm3=10,
        predicted_mm3=10,
        slice_tp_px=tp,
        slice_fp_px=10 - tp,
        slice_fn_px=10 - tp,
        slice_scores=(0.1, 0.9),
        slice_truth=(False, True),
        voxel_auroc=tp / 10,
        true_lesions=2,
        found_lesions=1,
        predicted_lesions=3,
        false_positives=2,
    )
    empty = np.zeros(65_536, np.int64)
    CaseEvaluation(metrics, LogitHistogram(empty, empty)).save(folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> AblationResults[Path]:
    root = tmp_path_factory.mktemp("results")
    prepared = write_prepared(root / "prepared", slices=4, tumour=3)
    segmented = root / "segmented"
    segmented.mkdir()
    blank = np.zeros((4, SIDE, SIDE), np.uint8)
    arrays: dict[str, np.ndarray] = dict.fromkeys(("pixels", "restored", "mask"), blank)
    arrays |= {"organ": blank + 1, "z": np.arange(4), "probability": blank.astype(np.float32)}
    save_file(arrays, segmented / "slices.safetensors")
    examples = root / "examples"
    examples.mkdir()
    save_file(dict.fromkeys(("clean", "spoilt", "restored", "mask", "organ"), blank[:1]), examples / EXAMPLES)

    def seeds(row: str, values: Mapping[int, Sequence[int]]) -> dict[int, list[CaseResult[Path]]]:
        found: dict[int, list[CaseResult[Path]]] = {}
        for seed, points in values.items():
            for number, tp in enumerate(points):
                folder = evaluated(root / row / str(seed) / str(number), tp)
                (folder / "truth.safetensors").write_bytes((prepared / "truth.safetensors").read_bytes())
                found.setdefault(seed, []).append(CaseResult(f"lits-{number}", prepared, segmented, folder))
        return found

    return AblationResults(
        variants=[
            VariantResult("rows", "a", seeds("a", DICE["a"]), examples),
            VariantResult("rows", "b", seeds("b", DICE["b"]), examples),
            VariantResult("th", "200", seeds("th200", {0: (5, 5)})),
        ],
        snapshots=[
            SnapshotResult(2, seeds("s2", {0: (2, 2), 1: (4, 4)})),
            SnapshotResult(1, seeds("s1", {0: (6, 6), 1: (6, 6)})),
        ],
        baseline=[CaseResult("lits-0", prepared, None, evaluated(root / "yard", 9))],
        failures=[
            CaseFailure("seed 0: model", "restoration", "the loss became NaN", group="c"),
            CaseFailure("lits-9", "prepare", f"{SECRET}/x.nii.gz: bad", "x.nii.gz"),
        ],
    )


def write(out: Path, results: AblationResults[Path]) -> Path:
    settings = AblationSettings.model_validate(SETTINGS)
    write_ablation_report(out, settings=settings, results=results, versions={"python": "3"}, notes=["a note"])
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, results: AblationResults[Path]) -> Path:
    return write(tmp_path_factory.mktemp("out"), results)


def document(out: Path) -> Any:
    return AblationDocument.model_validate_json((out / "report.json").read_bytes())


def test_means_and_sds_are_over_seeds(written: Path) -> None:
    found = document(written)
    a, b, c = found.rows
    # micro Dice of a seed, over all pixels together: (2 + 4) / 20 and (4 + 6) / 20
    dice = a.stats["micro_dice_2d"]
    assert dice.mean == pytest.approx(0.4)
    assert dice.n == 2
    assert dice.sd == pytest.approx(math.sqrt(0.02))
    assert b.stats["dice_3d_mean"].mean == pytest.approx(0.75)
    assert (a.stats["lesion_sensitivity"].mean, a.stats["lesion_sensitivity"].sd) == (0.5, 0.0)
    assert a.stats["false_positives_per_case"].mean == 2
    assert (c.seeds, c.missing_seeds) == ((), (0, 1))
    (low, high) = found.sweeps[0].rows
    assert low.seeds == ()
    assert (high.stats["micro_dice_2d"].sd, high.missing_seeds) == (None, (1,)), (
        "a single seed has no standard deviation"
    )
    assert found.baseline.row.stats["voxel_auroc_mean"].mean == 0.9


def test_rows_are_paired_by_seed_and_by_case(written: Path) -> None:
    tables = {(table.figure, table.paired_by): table for table in document(written).paired}
    (pair,) = tables["micro_dice_2d", "seed"].pairs
    # differences 0.7 - 0.3 and 0.8 - 0.5: mean 0.35, sd 0.0707, t = 0.35 / 0.05
    assert (pair.a, pair.b, pair.n) == ("b", "a", 2)
    assert pair.difference == pytest.approx(0.35)
    assert pair.t == pytest.approx(7.0)
    # t with one degree of freedom has Cauchy's distribution; a single pair needs no correction
    assert pair.p == pytest.approx(1 - 2 * math.atan(7.0) / math.pi)
    assert pair.p_holm == pair.p
    (by_case,) = tables["dice_3d_mean", "case"].pairs
    # means over seeds: lits-0 0.7 - 0.3, lits-1 0.8 - 0.5
    assert by_case.difference == pytest.approx(0.35)
    assert by_case.n == 2


def test_each_pair_is_tested_once() -> None:
    rows = document_rows(["a", "b", "c", "d"])
    (table, *_) = paired_tables(rows, "d")
    assert [(pair.a, pair.b) for pair in table.pairs] == [
        *(("b", "a"), ("c", "b"), ("d", "c")),
        *(("a", "d"), ("b", "d")),
    ]
    assert paired_tables(rows[:1], None)[0].pairs == ()
    assert paired_tables([], None) == ()
    assert paired_tables(rows, None)[0].reference == "d", "the best by mean micro Dice"


def document_rows(names: Sequence[str]) -> list[Any]:
    from medad.reports.ablation.data import mean_over_seeds
    from medad.reports.ablation.document import FIGURES, RowReport, SeedFigures

    rows = []
    for number, name in enumerate(names):
        seeds = tuple(
            SeedFigures(seed=seed, figures=dict.fromkeys(FIGURES, number / 10 + seed / 100), cases=())
            for seed in (0, 1)
        )
        rows.append(
            RowReport(
                name=name,
                label=name,
                changes={},
                seeded=True,
                seeds=seeds,
                missing_seeds=(),
                stats=mean_over_seeds(seeds),
                published=None,
            )
        )
    return rows


def test_the_curve_rises_in_epochs(written: Path) -> None:
    curve = document(written).curve
    assert [point.epochs for point in curve.points] == [1, 2]
    means = [stat.mean for point in curve.points if (stat := point.stats["micro_dice_2d"])]
    assert means == [pytest.approx(0.6), pytest.approx(0.3)]


def test_the_page_is_whole_and_says_whose_figures_are_whose(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "published (thesis, table 3.2)" in page.words
    assert "14.8 ± 14.3" in page.words
    assert "ASC-Net" in page.words
    assert "52.6" in page.words
    assert "A & co" in page.words
    assert "no result: see failures" in page.words
    assert "prefers-color-scheme: dark" in text
    assert all((image["src"] or "").startswith("data:") for image in page.images)
    assert all(image["alt"] for image in page.images)
    # two slices for two rows, examples of two rows, and charts of rows, sweep and curve
    assert len(page.images) == 4 + 2 + 3


def test_nothing_of_a_folder_is_anywhere(written: Path) -> None:
    for path in written.iterdir():
        assert b"doe_jane" not in path.read_bytes(), path
    shown = document(written).settings
    assert shown["base"]["train_data"]["root"] == PLACEHOLDER
    assert shown["rows"][0]["set"]["test_data.root"] == PLACEHOLDER


def test_csv_and_latex_say_the_same(written: Path) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        with (written / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    summary = {(row["group"], row["row"]): row for row in rows("summary.csv")}
    assert float(summary["rows", "a"]["micro_dice_2d_mean"]) == pytest.approx(0.4)
    assert summary["rows", "a"]["published_dice_percent"] == "14.75"
    assert summary["published", ""]["micro_dice_2d_mean"] == ""
    assert len(rows("seeds.csv")) == 2 + 2 + 1 + 1
    assert len(rows("cases.csv")) == 4 + 4 + 1 + 2
    assert [row["epochs"] for row in rows("curve.csv")] == ["1", "2"]
    assert {row["paired_by"] for row in rows("paired.csv")} == {"seed", "case"}
    table = (written / "table.tex").read_text(encoding="utf-8")
    assert r"A \& co & $40.0 \pm 14.1$" in table
    assert r"\textit{A \& co} (published: thesis, table 3.2) & $14.75 \pm 14.28$" in table
    assert "$52.56$" in (written / "table_th.tex").read_text(encoding="utf-8")


def test_equal_results_give_equal_bytes(written: Path, tmp_path: Path, results: AblationResults[Path]) -> None:
    write(tmp_path, results)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_an_ablation_of_which_all_failed_still_has_a_report(tmp_path: Path) -> None:
    settings = AblationSettings.model_validate(SETTINGS)
    write_ablation_report(tmp_path, settings=settings, results=AblationResults(variants=[]), versions={})
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["paired"] == []
    assert not (tmp_path / "preview.png").exists()
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@needs_browser
def test_the_page_is_sound_in_a_narrow_window(written: Path, tmp_path: Path) -> None:
    with opened(written / "report.html", tmp_path, width=360) as page:
        assert_sound(page)
