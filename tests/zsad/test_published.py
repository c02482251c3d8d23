"""The quoted rows against the papers' own prose and tables, and against each other."""

from __future__ import annotations

import pytest

from zsad.config import Variant
from zsad.published import CATEGORIES, DUAL_IMAGE, Benchmark, PublishedRow, Quoted, published_row, published_rows

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
    """Outperforming AnoCLIP "by margins of 2.2%, 6.0%, 6.2% in AUROC, F1Max, and PRO for anomaly localization"."""
    ours = published_row("mvtec", "joint_tta")
    anoclip = next(row for row in published_rows("mvtec") if row.system == "AnoCLIP")
    margins = [a - b for a, b in zip(means(ours)[3:], means(anoclip)[3:], strict=True) if a is not None and b]
    # the text reckons with table 1, whose pixel F1max is 42.5
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
        # fractions by mistake would all lie below 1
        assert max(values) > 10
        assert max(values) <= 100


def test_variants_that_no_paper_printed_have_no_row() -> None:
    assert published_row("mvtec", "visual") is None
    assert published_row("visa", "text") is None
    assert [row.variant for row in published_rows("visa")][:2] == ["joint", "joint_tta"]


def test_benchmarks_have_their_fifteen_and_twelve_categories() -> None:
    assert {name: len(set(found)) for name, found in CATEGORIES.items()} == {"mvtec": 15, "visa": 12}
