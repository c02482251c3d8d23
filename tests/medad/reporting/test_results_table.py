"""The table of rows x seeds x metrics, by values computed by hand."""

from __future__ import annotations

from operator import itemgetter

import pytest

from medad.base.metric import Metric
from medad.reporting.paired_tests import PairedOutcome
from medad.reporting.results_table import ResultsTable, booktabs, corrected, latex_figure, stat_columns
from medad.reporting.seed_statistics import Stat

DICE = Metric("dice", "voxel Dice", "voxel", "Overlap.", itemgetter("dice"))
FALSE = Metric("false", "false positives", "case", "Fewer is better.", itemgetter("false"), False, False)
ROWS: dict[str, dict[int, dict[str, float | None]]] = {
    "a": {0: {"dice": 0.5, "false": 3.0}, 1: {"dice": 0.7, "false": 1.0}},
    "b": {0: {"dice": 0.9, "false": 5.0}, 1: {"dice": None, "false": 5.0}},
    "c": {},
    "d": {0: {"dice": 0.6004, "false": 0.5}},
}


def test_means_are_over_seeds_and_undefined_seeds_count_only_if_asked() -> None:
    strict, lenient = (ResultsTable((DICE, FALSE), ROWS, undefined_seeds_count=each).stats() for each in (True, False))
    stat = strict["a"]["dice"]
    assert stat is not None
    assert stat.mean == pytest.approx(0.6)
    assert stat.sd == pytest.approx(0.02**0.5)
    assert stat.n == 2
    assert strict["b"]["dice"] is None
    assert lenient["b"]["dice"] == Stat(mean=0.9, sd=None, n=1)
    assert strict["c"] == lenient["c"] == {"dice": None, "false": None}


def test_ranks_follow_the_direction_and_equal_print_is_equal_rank() -> None:
    results = ResultsTable((DICE, FALSE), ROWS, undefined_seeds_count=False)
    ranks = results.ranks(results.stats())
    assert {row: found["dice"] for row, found in ranks.items()} == {"a": 2, "b": 1, "c": None, "d": 2}
    assert {row: found["false"] for row, found in ranks.items()} == {"a": 2, "b": 3, "c": None, "d": 1}


def test_titles() -> None:
    assert (DICE.heading, DICE.short_title) == ("Voxel Dice", "Dice")
    assert FALSE.short_title == "false positives"


def test_holms_correction_is_over_the_table() -> None:
    tests = [("a", "b", PairedOutcome(0.1, p, 5)) for p in (0.04, 0.01, None)]
    assert [p for *_, p in corrected(tests)] == [0.04, 0.02, None]


def test_columns_and_latex() -> None:
    assert stat_columns({"dice": Stat(mean=0.5, sd=None, n=1)}, ["dice", "other"], "seeds") == {
        **{"dice_mean": 0.5, "dice_sd": None, "dice_seeds": 1},
        **dict.fromkeys(("other_mean", "other_sd", "other_seeds")),
    }
    assert latex_figure(1.26, 0.04) == r"$1.3 \pm 0.0$"
    assert latex_figure(None, 1.0) == "--"
    table = booktabs("A caption.", ["row", "x", "y"], [r"a & 1 & 2 \\"], []).splitlines()
    assert table[4:8] == [r"\begin{tabular}{lcc}", r"\toprule", r"row & x & y \\", r"\midrule"]
    assert table.count(r"\midrule") == 1
    assert booktabs("", ["r", "x"], [], [r"p & 3 \\"]).count(r"\midrule") == 2
