"""Pictures of the liver report: panels, outlines, colours, crop and scale bar."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from medad.reports import pictures
from tests.medad.report_cases import Array


def picture(uri: str | None) -> Array:
    assert uri is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.mark.parametrize("loss", [[], [0.0], [1e-7, 1e-7], [5.0]])
def test_odd_curves_are_drawn(loss: list[float]) -> None:
    curve = ("phase", [float(step) for step in range(len(loss))], loss)
    svg = pictures.curves_svg([curve])
    assert svg == pictures.curves_svg([curve])
    assert "<svg" in svg


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
