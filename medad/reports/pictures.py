"""Pictures of the report: a row of panels per slice, the colour bar, the training curves. No pyplot, no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import find_contours

from medad.reporting.charts import chart_style, style_axes, svg_text
from medad.reporting.page import png_uri

PREDICTION_RGB = (230, 159, 0)
TRUTH_RGB = (86, 180, 233)
"""Orange and sky blue of Okabe and Ito's palette, which people with any colour vision can distinguish.

The outline of the ground truth is also dashed.
"""

DIFFERENCE_LIMIT = 100
"""|slice - restoration| that is shown white, in grey levels. It is the largest shift that training inserts."""

PANELS = ("slice", "restoration", "difference", "probability", "outlines")

_GAP_PX = 4
_SUPERSAMPLE = 3
_PROBABILITY_RGB: UInt8[np.ndarray, "256 3"] = np.round(
    matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255
).astype(np.uint8)


@dataclass(frozen=True)
class SliceView:
    """One axial slice on the slice grid. Rows run to the patient's back, columns to the patient's left."""

    pixels: UInt8[np.ndarray, "S S"]
    restored: UInt8[np.ndarray, "S S"]
    organ: Bool[np.ndarray, "S S"]
    probability: Float32[np.ndarray, "S S"]
    prediction: Bool[np.ndarray, "S S"]
    truth: Bool[np.ndarray, "S S"] | None


@dataclass(frozen=True)
class Crop:
    """A square window of the slice grid, which can extend beyond the edge."""

    row: int
    col: int
    side: int


def crop_around(organ: Bool[np.ndarray, "S S"], *, min_side: int) -> Crop:
    """Return the square around the organ with a margin of a tenth on each side, at least `min_side` pixels wide."""
    rows, cols = np.flatnonzero(organ.any(axis=1)), np.flatnonzero(organ.any(axis=0))
    if not rows.size:
        return Crop(0, 0, organ.shape[0])
    extent = max(int(rows[-1] - rows[0]), int(cols[-1] - cols[0])) + 1
    side = max(math.ceil(1.2 * extent), min_side)
    return Crop((int(rows[0] + rows[-1]) + 1 - side) // 2, (int(cols[0] + cols[-1]) + 1 - side) // 2, side)


def row_width_px(panel_px: int) -> int:
    """Return the width of a row of panels."""
    return len(PANELS) * (panel_px + _GAP_PX) - _GAP_PX


def panel_row(view: SliceView, crop: Crop, panel_px: int, *, px_mm: float) -> Image.Image:
    """Return the five panels of `PANELS` side by side: RGB, `panel_px` high.

    The view is radiological: the patient's right is on the left (R), the front is on top (A). Probability is shown
    inside the organ on a fixed scale, 0..1. The difference is clipped at `DIFFERENCE_LIMIT`. The first panel has
    a scale bar. `px_mm` is the width of a pixel of the slice grid.
    """
    organ = _cut_out(view.organ, crop)
    grey = _grey(_cut_out(view.pixels, crop), panel_px)
    difference = difference_picture(view.pixels, view.restored, view.organ)
    outlines = grey.copy()
    _outline(outlines, _cut_out(view.prediction, crop), PREDICTION_RGB, dashed=False)
    if view.truth is not None:
        _outline(outlines, _cut_out(view.truth, crop), TRUTH_RGB, dashed=True)
    panels = [
        _with_marks(grey, panel_px / (crop.side * px_mm)),
        # the network's output outside the organ is never used
        _grey(np.where(organ, _cut_out(view.restored, crop), 0).astype(np.uint8), panel_px),
        _grey(_cut_out(difference, crop), panel_px),
        _heat_map(_cut_out(view.probability, crop), organ, panel_px),
        outlines,
    ]
    return _side_by_side(panels)


def difference_picture(
    first: UInt8[np.ndarray, "S S"], second: UInt8[np.ndarray, "S S"], organ: Bool[np.ndarray, "S S"]
) -> UInt8[np.ndarray, "S S"]:
    """Return |first - second| inside the organ as a grey picture, white from `DIFFERENCE_LIMIT`."""
    difference = np.abs(first.astype(np.int16) - second.astype(np.int16))
    shown: UInt8[np.ndarray, "S S"] = np.where(organ, np.minimum(difference * 255.0 / DIFFERENCE_LIMIT, 255), 0).astype(
        np.uint8
    )
    return shown


def grey_row(planes: Sequence[UInt8[np.ndarray, "S S"]], crop: Crop, panel_px: int) -> Image.Image:
    """Return grey planes of one slice grid side by side: RGB, `panel_px` high."""
    return _side_by_side([_grey(_cut_out(plane, crop), panel_px) for plane in planes])


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    width, height = panels[0].size
    row = Image.new("RGB", (len(panels) * (width + _GAP_PX) - _GAP_PX, height), (128, 128, 128))
    for number, panel in enumerate(panels):
        row.paste(panel, (number * (width + _GAP_PX), 0))
    return row


def stack_rows(rows: Sequence[tuple[str, Image.Image]], headings: Sequence[str]) -> Image.Image:
    """Return a complete picture: panel headings on top, then each row with its caption below.

    The colour bar follows the heading of the heat map.
    """
    width = rows[0][1].width
    font, line = ImageFont.load_default(15), 24
    picture = Image.new("RGB", (width, line + sum(row.height + line for _, row in rows)), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for number, heading in enumerate(headings):
        left = number * (width + _GAP_PX) / len(headings) + 2
        draw.text((left, 4), heading, fill=(0, 0, 0), font=font)
        if PANELS[number] == "probability":
            bar = Image.fromarray(_PROBABILITY_RGB[None]).resize((64, 12))
            picture.paste(bar, (round(left + draw.textlength(heading, font=font)) + 8, 6))
    top = line
    for caption, row in rows:
        picture.paste(row, (0, top))
        draw.text((2, top + row.height + 3), caption, fill=(60, 60, 60), font=font)
        top += row.height + line
    return picture


def colour_bar_uri() -> str:
    """Return the colours of the heat map from probability 0 (left) to 1 (right), as a data URI."""
    return png_uri(Image.fromarray(_PROBABILITY_RGB[None]))


def curves_svg(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """Return training curves as SVG text: loss (logarithmic) over steps, one panel per title.

    Losses of 0 or less are not drawn.
    """
    with chart_style(10):
        figure = Figure(figsize=(4.6 * len(curves), 3.0), layout="constrained")
        for number, (title, steps, loss) in enumerate(curves, start=1):
            axes = figure.add_subplot(1, len(curves), number)
            points = [(step, value) for step, value in zip(steps, loss, strict=True) if value > 0]
            if points:
                axes.plot(*zip(*points, strict=True), color="#0072b2", linewidth=1.2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("step")
            axes.set_ylabel("loss (log scale)")
            style_axes(axes)
        return svg_text(figure)


def _cut_out(plane: np.ndarray, crop: Crop) -> np.ndarray:  # any dtype
    out = np.zeros((crop.side, crop.side), dtype=plane.dtype)
    row, col = max(crop.row, 0), max(crop.col, 0)
    part = plane[row : crop.row + crop.side, col : crop.col + crop.side]
    out[row - crop.row : row - crop.row + part.shape[0], col - crop.col : col - crop.col + part.shape[1]] = part
    return out


def _grey(plane: UInt8[np.ndarray, "s s"], side_px: int) -> Image.Image:
    image: Image.Image = Image.fromarray(plane).resize((side_px, side_px), Image.Resampling.BICUBIC)
    return image.convert("RGB")


def _heat_map(probability: Float32[np.ndarray, "s s"], organ: Bool[np.ndarray, "s s"], side_px: int) -> Image.Image:
    level = np.nan_to_num(np.where(organ, probability, 0.0)).astype(np.float32)
    smooth = Image.fromarray(level).resize((side_px, side_px), Image.Resampling.BILINEAR)
    inside = Image.fromarray(organ.astype(np.uint8)).resize((side_px, side_px), Image.Resampling.NEAREST)
    colours = _PROBABILITY_RGB[np.clip(np.asarray(smooth) * 255 + 0.5, 0, 255).astype(np.uint8)]
    colours[np.asarray(inside) == 0] = 0
    return Image.fromarray(colours)


def _with_marks(panel: Image.Image, px_per_mm: float) -> Image.Image:
    """Return the panel with R and A at their sides, and a scale bar below."""
    marked = panel.copy()
    draw = ImageDraw.Draw(marked)
    side = panel.width
    length_mm = next((mm for mm in (100, 50, 20, 10, 5, 2) if mm * px_per_mm <= 0.4 * side), 1)
    left, bottom = side - 5 - length_mm * px_per_mm, side - 5
    draw.line([(left, bottom), (side - 5, bottom)], fill=(255, 255, 255), width=2)
    large, small = ImageFont.load_default(max(11, side // 13)), ImageFont.load_default(max(9, side // 18))
    for text, place, font, anchor in (
        ("R", (3.0, side / 2), large, "lm"),
        ("A", (side / 2, 2.0), large, "mt"),
        (f"{length_mm} mm", (side - 5.0, bottom - 3.0), small, "rb"),
    ):
        draw.text(place, text, (255, 255, 255), font, anchor, stroke_width=1, stroke_fill=(0, 0, 0))
    return marked


def _outline(panel: Image.Image, mask: Bool[np.ndarray, "s s"], colour: tuple[int, int, int], *, dashed: bool) -> None:
    """Draw the smooth outline of the mask into the panel, dashed or solid, with a dark rim for contrast."""
    side = panel.width * _SUPERSAMPLE
    scale = side / mask.shape[0]
    width = max(4, round(panel.width * _SUPERSAMPLE / 105))
    dash = 3.0 * width
    ink = Image.new("L", (side, side))
    rim = Image.new("L", (side, side))
    # a margin of one pixel closes outlines at the window's edge; find_contours has pixel centres at integers
    for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        line = (contour[:, ::-1] - 0.5) * scale
        for stroke in _dashes(line, dash) if dashed else [line]:
            points = [(float(x), float(y)) for x, y in stroke]
            ImageDraw.Draw(rim).line(points, fill=255, width=width + 4, joint="curve")
            ImageDraw.Draw(ink).line(points, fill=255, width=width, joint="curve")
    for layer, fill in ((rim, (0, 0, 0)), (ink, colour)):
        alpha = layer.resize(panel.size, Image.Resampling.BOX)
        panel.paste(fill, (0, 0), alpha)


def _dashes(line: np.ndarray, dash: float) -> list[np.ndarray]:
    """Return every second section of length `dash` along a polyline of (x, y) points."""
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    strokes = []
    for start in np.arange(0.0, along[-1], 2 * dash):
        stop = min(start + dash, along[-1])
        at = np.concatenate([[start], along[(along > start) & (along < stop)], [stop]])
        strokes.append(np.stack([np.interp(at, along, line[:, axis]) for axis in (0, 1)], axis=1))
    return strokes
