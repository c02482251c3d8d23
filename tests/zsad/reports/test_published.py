"""Tests of the published rows: they must agree with the papers' texts and tables, and with each other."""

from __future__ import annotations

import pytest

from zsad.config.run import Variant
from zsad.config.settings import Ablation, ablation_systems
from zsad.reports.published import (
    ANOMALY_CLIP,
    ANOMALY_CLIP_DATA_SETS,
    ANOMALY_CLIP_SYSTEMS,
    CATEGORIES,
    DUAL_IMAGE,
    SEGMENTATION,
    Benchmark,
    PublishedRow,
    Quoted,
    anomaly_clip_rows,
    category_figures,
    published_ablation,
    published_row,
    published_rows,
    rows_for_comparison,
)

FIGURES = ("image_auroc", "image_f1max", "image_ap", "pixel_auroc", "pixel_f1max", "aupro")
BENCHMARKS: tuple[Benchmark, ...] = ("mvtec", "visa")


def means(row: PublishedRow | None) -> list[float | None]:
    assert row is not None
    quoted: list[Quoted | None] = [getattr(row, name) for name in FIGURES]
    return [None if one is None else one.mean for one in quoted]


@pytest.mark.parametrize(
    ("benchmark", "variant", "printed"),
    [
        # table 3, in the order AC: AUROC, F1max, AP; AL: AUROC, F1max, PRO
        ("mvtec", "text", [91.6, 92.9, 96.4, 85.3, 29.1, 71.8]),
        ("mvtec", "text_tta", [92.1, 93.1, 96.6, 88.7, 35.6, 80.1]),
        ("mvtec", "joint", [93.1, 94.0, 96.6, 92.6, 41.8, 82.6]),
        ("mvtec", "joint_tta", [93.2, 94.1, 96.7, 92.8, 42.4, 84.0]),
        # table 1
        ("visa", "joint", [82.6, 81.0, 84.2, 94.8, 23.5, 78.6]),
        ("visa", "joint_tta", [82.9, 80.9, 84.7, 94.2, 24.1, 79.7]),
    ],
)
def test_the_methods_rows_are_the_printed_ones(benchmark: Benchmark, variant: Variant, printed: list[float]) -> None:
    row = published_row(benchmark, variant)
    assert means(row) == printed
    assert row is not None
    assert row.paper == DUAL_IMAGE
    assert row.table


def test_margins_over_anoclip_are_those_of_the_papers_text() -> None:
    """Check the dual-image paper's text.

    It says: better than AnoCLIP "by margins of 2.2%, 6.0%, 6.2% in AUROC, F1Max, and PRO ...".
    """
    ours = published_row("mvtec", "joint_tta")
    anoclip = next(row for row in published_rows("mvtec") if row.system == "AnoCLIP")
    margins = [a - b for a, b in zip(means(ours)[3:], means(anoclip)[3:], strict=True) if a is not None and b]
    # the text uses table 1, with a pixel F1max of 42.5
    assert margins == pytest.approx([2.2, 6.0, 6.2], abs=0.11)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_row_names_its_paper_and_table_and_is_in_percent(benchmark: Benchmark) -> None:
    rows = published_rows(benchmark)
    assert len({row.system for row in rows}) == len(rows)
    for row in rows:
        assert row.paper
        assert row.table
        values = [value for value in means(row) if value is not None]
        assert values
        # fractions by mistake would all be below 1
        assert max(values) > 10
        assert max(values) <= 100


def test_variants_that_no_paper_printed_have_no_row() -> None:
    assert published_row("mvtec", "visual") is None
    assert published_row("visa", "text") is None
    assert [row.variant for row in published_rows("visa")][:2] == ["joint", "joint_tta"]


def test_benchmarks_have_their_fifteen_and_twelve_categories() -> None:
    assert {name: len(set(found)) for name, found in CATEGORIES.items()} == {"mvtec": 15, "visa": 12}


# ---------------------------------------------------------------- AnomalyCLIP, tables 1 and 2


# each line is a row of the printed table: data set, level, then AUROC and AP (images) or PRO (pixels) of each system
ANOMALY_CLIP_PRINTED = """
MPDD image (54.3, 65.4) (56.2, 66.0) (63.6, 69.9) (73.0, 80.2) (55.1, 64.2) (77.0, 82.0)
SDD image (65.7, 45.2) (65.2, 45.7) (84.3, 77.4) (79.8, 71.4) (74.9, 65.1) (84.7, 80.0)
VisA pixel (46.6, 14.8) (47.8, 17.3) (79.6, 56.8) (94.2, 86.8) (24.2, 3.8) (95.5, 87.0)
BTAD pixel (30.6, 4.4) (32.8, 8.3) (72.7, 27.3) (60.8, 25.0) (28.6, 3.8) (94.2, 74.8)
DTD-Synthetic pixel (33.9, 12.5) (23.7, 5.5) (83.9, 57.8) (95.3, 86.9) (-, -) (97.9, 92.3)
COVID-19 image (73.7, 42.4) (75.0, 45.9) (66.4, 42.9) (15.5, 8.5) (25.3, 9.2) (80.1, 58.7)
Br35H image (78.4, 78.8) (82.7, 81.3) (80.5, 82.2) (93.1, 92.9) (86.0, 87.5) (94.6, 94.7)
CVC-ClinicDB pixel (47.5, 18.9) (48.5, 12.6) (51.2, 13.8) (80.5, 60.7) (34.8, 2.4) (82.9, 67.8)
TN3K pixel (42.3, 7.3) (35.6, 5.2) (70.7, 39.8) (73.6, 37.8) (34.0, 9.5) (81.5, 50.4)
"""


@pytest.mark.parametrize("line", ANOMALY_CLIP_PRINTED.strip().splitlines(), ids=lambda line: line.split(" (")[0])
def test_rows_of_anomalyclip_are_the_printed_ones(line: str) -> None:
    head, *pairs = line.split(" (")
    data_set, level = head.split()
    first, second = (0, 2) if level == "image" else (3, 5)
    rows = {row.system: means(row) for row in anomaly_clip_rows(data_set)}
    for system, pair in zip(ANOMALY_CLIP_SYSTEMS, pairs, strict=True):
        printed = [None if one == "-" else float(one) for one in pair.rstrip(")").split(", ")]
        here = rows.get(system, [None] * 6)
        assert [here[first], here[second]] == printed
        # the tables print no F1max
        assert here[1] is None
        assert here[4] is None


def test_anomalyclip_has_seventeen_data_sets_in_two_tables() -> None:
    assert len(ANOMALY_CLIP_DATA_SETS) == len(set(ANOMALY_CLIP_DATA_SETS)) == 17
    tables = {data_set: {row.table for row in anomaly_clip_rows(data_set)} for data_set in ANOMALY_CLIP_DATA_SETS}
    assert [name for name, of in tables.items() if of == {"table 1"}] == list(ANOMALY_CLIP_DATA_SETS[:7])
    assert all(of == {"table 2"} for name, of in tables.items() if name not in ANOMALY_CLIP_DATA_SETS[:7])
    # medical sets have either labels or masks, not both
    medical = [row for name in ANOMALY_CLIP_DATA_SETS[7:] for row in anomaly_clip_rows(name)]
    assert all((row.image_auroc is None) != (row.pixel_auroc is None) for row in medical)
    assert all(row.paper == ANOMALY_CLIP for row in medical)
    assert "CoOp" not in {row.system for row in anomaly_clip_rows("DTD-Synthetic")}
    with pytest.raises(KeyError):
        anomaly_clip_rows("LiTS")


def test_compared_rows_name_each_system_once_a_paper() -> None:
    for benchmark in BENCHMARKS:
        rows = rows_for_comparison(benchmark)
        assert rows[: len(published_rows(benchmark))] == published_rows(benchmark)
        assert len({(row.system, row.paper) for row in rows}) == len(rows)
        assert {row.system for row in rows if row.paper == ANOMALY_CLIP} == set(ANOMALY_CLIP_SYSTEMS)
    # both papers print AnomalyCLIP's figures; they agree
    assert means(anomaly_clip_rows("MVTec AD")[-1]) == [91.5, None, 96.2, 91.1, None, 81.4]
    of_segmentation = {
        row.system: (means(row)[1], means(row)[4]) for row in rows_for_comparison("visa") if row.paper == SEGMENTATION
    }
    assert of_segmentation == {"WinCLIP": (79.0, 14.8), "APRIL-GAN": (78.7, 32.3), "Segmentation models": (81.5, 24.2)}


# ---------------------------------------------------------------- segmentation-model paper, tables 1 and 2


def test_tables_of_segmentation_have_their_printed_means() -> None:
    """A wrong digit in any column would give a mean that differs from the printed one."""
    tables = category_figures()
    assert len(tables) == 6
    for one in tables:
        assert set(one.figures) == set(CATEGORIES["visa"])
        # the figures and their mean are each printed to 0.1
        assert sum(one.figures.values()) / 12 == pytest.approx(one.mean, abs=0.1)
        assert (one.paper, one.table) == (SEGMENTATION, "table 1" if one.metric == "image_f1max" else "table 2")


@pytest.mark.parametrize(
    ("system", "metric", "category", "printed"),
    [
        ("Segmentation models", "image_f1max", "pcb1", 74.3),
        ("Segmentation models", "image_f1max", "pipe_fryum", 90.0),
        ("Segmentation models", "pixel_f1max", "chewinggum", 63.4),
        ("Segmentation models", "pixel_f1max", "macaroni2", 7.2),
        ("APRIL-GAN", "image_f1max", "fryum", 91.7),
        ("APRIL-GAN", "pixel_f1max", "capsules", 48.5),
        ("WinCLIP", "image_f1max", "candle", 89.4),
        ("WinCLIP", "pixel_f1max", "pcb4", 32.0),
    ],
)
def test_figures_of_segmentation_are_the_printed_ones(system: str, metric: str, category: str, printed: float) -> None:
    found = [one.figures[category] for one in category_figures() if (one.system, one.metric) == (system, metric)]
    assert found == [printed]


# ---------------------------------------------------------------- dual-image paper, ablations


def test_weights_of_the_supplement_are_the_printed_ones() -> None:
    maps = {row.system: (row.pixel_auroc, row.pixel_f1max, row.aupro) for row in published_ablation("map_weights")}
    assert maps["1, 0.5"] == (Quoted(92.5, 0.2), Quoted(41.7, 0.8), Quoted(82.2, 0.3))
    assert maps["2, 2"] == (Quoted(92.7, 0.2), Quoted(42.3, 0.6), Quoted(84.1, 0.3))
    classes = {
        row.system: (row.image_auroc, row.image_f1max, row.image_ap) for row in published_ablation("image_weights")
    }
    assert classes["1, 1, 2"] == (Quoted(93.1, 0.8), Quoted(94.0, 0.3), Quoted(96.8, 0.4))
    assert classes["1, 2, 1"] == (Quoted(91.9, 0.8), Quoted(93.2, 0.2), Quoted(94.8, 0.4))
    # the weights that the supplement chooses are those of the method in table 3
    method = published_row("mvtec", "joint_tta")
    assert method is not None
    assert maps["1, 1.5"] == (method.pixel_auroc, method.pixel_f1max, method.aupro)
    assert classes["1, 1, 1"] == (method.image_auroc, method.image_f1max, method.image_ap)


def test_ablation_rows_are_called_as_ours_are() -> None:
    every: tuple[Ablation, ...] = ("references", "map_weights", "image_weights", "steps")
    for ablation in every:
        ours = {label for label, _ in ablation_systems(ablation, "main")}
        printed = [row.system for row in published_ablation(ablation)]
        assert printed
        assert set(printed) <= ours
        if ablation in ("map_weights", "image_weights"):
            assert set(printed) == ours
    # only adaptation, and adaptation with one reference
    assert [means(row)[3] for row in published_ablation("references")] == [88.7, 92.8]
    assert [row.system for row in published_ablation("steps")] == ["2"]
    assert published_ablation("none such") == ()
