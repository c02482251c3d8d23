"""Tests of the report's pictures, with images made here: colours, outlines, sizes and charts."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zsad.reports import pictures
from zsad.reports.charts import NamedCurve, ScoreSets, category_chart
from zsad.reports.pictures import HeatScale, ImageView, overlay, panel_row, row_width_px

Array = np.ndarray[Any, Any]

SCALE = HeatScale(0.0, 1.0)


def view(**changes: Any) -> ImageView:
    values: dict[str, Any] = {
        "image": np.full((60, 60, 3), 128, np.uint8),
        "scores": np.zeros((60, 60), np.float32),
        "mask": None,
        "reference": None,
    }
    return ImageView(**(values | changes))


def panels(one: ImageView, scale: HeatScale = SCALE, panel_px: int = 120) -> list[Array]:
    row = np.asarray(panel_row(one, scale, panel_px)).astype(int)
    count = 2 if one.reference is None else 3
    assert row.shape[1] == row_width_px(count, panel_px)
    pitch = (row.shape[1] - panel_px) // (count - 1)
    return [row[:, i * pitch : i * pitch + panel_px] for i in range(count)]


def outlined(panel: Array) -> Array:
    """Return the mask of the blue pixels of a grey or black panel."""
    found: Array = panel[:, :, 2] - panel[:, :, 0] > 60
    return found


def bar() -> Array:
    content = base64.b64decode(pictures.colour_bar_uri().split(",", 1)[1])
    shown: Array = np.asarray(Image.open(io.BytesIO(content)))[0]
    return shown


def test_a_colour_means_the_same_score_whatever_else_is_shown() -> None:
    alone, crowded = np.full((60, 60), 0.25, np.float32), np.full((60, 60), 0.25, np.float32)
    crowded[40:] = 7.5
    here, there = (panels(view(scores=scores))[1] for scores in (alone, crowded))
    np.testing.assert_array_equal(here[20, 60], there[20, 60])
    np.testing.assert_array_equal(here[20, 60], bar()[round(0.25 * 255)])
    # scores above the scale have its brightest colour, not a wrapped one
    np.testing.assert_array_equal(there[110, 60], bar()[255])


def test_scale_moves_with_its_limits_and_survives_equal_ones() -> None:
    scores = np.linspace(-3.0, 5.0, 9, dtype=np.float32)[None]
    np.testing.assert_allclose(HeatScale(-3.0, 5.0).levels(scores), np.linspace(0, 1, 9)[None], atol=1e-6)
    flat = HeatScale(0.5, 0.5)
    np.testing.assert_array_equal(flat.levels(np.array([[0.25, 0.5, 0.75]], np.float32)), [[0.0, 0.0, 1.0]])


def test_outline_lies_on_the_masks_edge_in_image_and_heat_map_alone() -> None:
    y, x = np.mgrid[:240, :240]
    disc = (x - 100) ** 2 + (y - 130) ** 2 <= 60**2
    image = np.full((240, 240, 3), 128, np.uint8)
    shown = panels(view(image=image, mask=disc, reference=image), panel_px=120)
    for panel in (shown[0], shown[2]):
        rows, columns = np.nonzero(outlined(panel))
        radius = np.hypot(rows + 0.5 - 65.25, columns + 0.5 - 50.25)
        assert np.abs(radius - 30).max() < 2.5
        angles = np.arctan2(rows - 65, columns - 50)
        assert len(np.unique(np.floor((angles + np.pi) / (2 * np.pi) * 60))) >= 60
    assert not outlined(shown[1]).any()
    assert not outlined(panels(view(mask=np.zeros((60, 60), bool)))[0]).any()


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1234, 2999), (2047, 1500)])
def test_one_pixel_of_a_large_mask_is_still_outlined_in_its_place(row: int, column: int) -> None:
    mask = np.zeros((2048, 3000), bool)
    mask[row, column] = True
    image = np.full((2048, 3000, 3), 128, np.uint8)
    (shown, _) = panels(view(image=image, mask=mask, scores=np.zeros((20, 30), np.float32)), panel_px=150)
    found = outlined(shown)
    assert found.any()
    rows, columns = np.nonzero(found)
    # 3000 px are shown in 150 px: a twentieth
    assert abs(rows.mean() + 0.5 - row / 20) < 3
    assert abs(columns.mean() + 0.5 - column / 20) < 3


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_panels_keep_proportions_and_fit_whatever_the_shape(height: int, width: int, h: int, w: int) -> None:
    image = np.full((height, width, 3), 10, np.uint8)
    one = view(image=image, scores=np.zeros((h, w), np.float32), mask=np.ones((height, width), bool))
    row = panel_row(one, SCALE, 64)
    assert row.width == row_width_px(2, 64)
    assert row.height == max(1, round(64 * height / max(height, width)))


def test_reference_of_another_shape_stands_beside_in_its_own_proportions() -> None:
    red = np.zeros((30, 90, 3), np.uint8)
    red[:, :, 0] = 255
    shown = panels(view(reference=red), panel_px=90)
    reds = (shown[1] == (255, 0, 0)).all(axis=2)
    assert abs(np.count_nonzero(reds.any(axis=1)) - 30) <= 2
    assert np.count_nonzero(reds.any(axis=0)) >= 88
    assert not (shown[0] == (255, 0, 0)).all(axis=2).any()


def test_overlay_leaves_the_image_where_nothing_is_wrong_and_covers_it_where_something_is() -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    scores = np.zeros((20, 30), np.float32)
    scores[:, 15:] = 2.0
    over = np.asarray(overlay(image, scores, SCALE)).astype(int)
    np.testing.assert_array_equal(over[:, :15], image[:, :15])
    mixed = 0.55 * bar()[255] + 0.45 * image[:, 15:]
    np.testing.assert_allclose(over[:, 15:], mixed, atol=2)


def svg(uri: str) -> str:
    return base64.b64decode(uri.split(",", 1)[1]).decode()


@pytest.mark.parametrize(
    "sets",
    [
        ScoreSets([], [], [], None, None),
        ScoreSets([0.5], [], [], None, None),
        ScoreSets([0.25] * 9, [0.25], [], 0.25, 0.25),
        ScoreSets([], [], [1e-12, 2e-12], 1.5e-12, None),
        ScoreSets([-1e6, 1e6], [3.0], [0.0], 2.0, 1.0),
    ],
)
def test_odd_scores_are_drawn_the_same_each_time(sets: ScoreSets) -> None:
    first = category_chart(sets, [], [])
    assert first == category_chart(sets, [], [])
    assert "<svg" in svg(first)


def test_chart_names_thresholds_and_curves() -> None:
    roc = [
        NamedCurve("images", ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0))),
        NamedCurve("pixels", ((0.0, 1.0), (0.0, 1.0)), True),
    ]
    text = svg(category_chart(ScoreSets([0.1, 0.2], [0.3], [], 0.25, 0.28), roc, roc))
    for word in ("deployable threshold", "oracle threshold (F1max)", "normal (2)", "anomalous (1)", "ROC", "pixels"):
        assert word in text
    assert "no label" not in text
    assert "oracle" not in svg(category_chart(ScoreSets([], [], [0.3], 0.25, None), [], []))


def test_rows_fill_the_columns_from_left_to_right() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    rows = [(f"row {number}", Image.new("RGB", (50, 30), colour)) for number, colour in enumerate(colours)]
    picture = np.asarray(pictures.stack_rows(rows, ["image", "heat map"], SCALE, columns=2))
    height, width = picture.shape[:2]
    for number, colour in enumerate(colours):
        y, x = np.nonzero((picture == colour).all(axis=-1))
        assert len(y) == 50 * 30
        assert (y.mean() > height / 2) == (number >= 2)
        assert (x.mean() > width / 2) == (number % 2 == 1)


def test_an_incomplete_last_line_is_left_white() -> None:
    rows = [(f"row {number}", Image.new("RGB", (50, 30), (200, 0, 0))) for number in range(3)]
    picture = np.asarray(pictures.stack_rows(rows, ["image"], SCALE, columns=2))
    assert (picture == (200, 0, 0)).all(axis=-1).sum() == 3 * 50 * 30
    assert (picture[-50:-24, -50:] > 100).all()
