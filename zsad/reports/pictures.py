"""Pictures of reports: an image, its reference image, its heat map, and the outline of the true mask.

Nothing here uses pyplot or global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import block_reduce, find_contours

from medad.reporting.page import png_uri

OUTLINE_RGB = (86, 180, 233)
"""Sky blue from Okabe and Ito's palette. It differs from all colours of the heat map for all types of colour vision."""
OVERLAY_OPACITY = 0.55
"""Opacity of the heat map in `overlay` at the highest score."""

_HEAT_RGB: UInt8[np.ndarray, "256 3"] = np.round(matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(
    np.uint8
)
_PAPER_RGB = (255, 255, 255)
_GAP_PX = 4
_SUPERSAMPLE = 3
_CONTOUR_PX = 1024
"""Side to which a larger mask is reduced before its outline is computed. No region is lost."""


@dataclass(frozen=True)
class HeatScale:
    """Colour scale of heat maps. A report has one scale, so its panels are comparable."""

    low: float
    """Scores of this value or less are black."""
    high: float
    """Scores of this value or more are bright yellow."""

    def colours(self, scores: Float32[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
        """Return the colours of the scores."""
        colours: UInt8[np.ndarray, "H W 3"] = _HEAT_RGB[np.round(self.levels(scores) * 255).astype(np.uint8)]
        return colours

    def levels(self, scores: Float32[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
        """Return the scores scaled to 0..1, clipped at both ends."""
        # limits that are equal in float32 would divide by zero
        span = max(self.high - self.low, float(np.finfo(np.float32).tiny))
        return np.clip((scores - self.low) / span, 0.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class ImageView:
    """Data for the panels of one image. Map and mask can have any size, but have the proportions of the image."""

    image: UInt8[np.ndarray, "H W 3"]
    scores: Float32[np.ndarray, "h w"]
    mask: Bool[np.ndarray, "H W"] | None
    reference: UInt8[np.ndarray, "G K 3"] | None
    """The reference image. None: the image was not compared with another."""


def panel_row(view: ImageView, scale: HeatScale, panel_px: int) -> Image.Image:
    """Return panels side by side: image, reference image if any, heat map. Each fits into a square of `panel_px`.

    The outline of the mask is drawn on the image and on the heat map.
    """
    size = _fitted(view.image.shape[:2], panel_px)
    image = _resized(view.image, size)
    heat = Image.fromarray(scale.colours(_resized_map(view.scores, size)))
    if view.mask is not None:
        for panel in (image, heat):
            _outline(panel, view.mask)
    panels = [image]
    if view.reference is not None:
        panels.append(_resized(view.reference, _fitted(view.reference.shape[:2], panel_px)))
    panels.append(heat)
    row = Image.new("RGB", (row_width_px(len(panels), panel_px), max(panel.height for panel in panels)), _PAPER_RGB)
    for number, panel in enumerate(panels):
        left = number * (panel_px + _GAP_PX) + (panel_px - panel.width) // 2
        row.paste(panel, (left, (row.height - panel.height) // 2))
    return row


def row_width_px(panels: int, panel_px: int) -> int:
    """Return the width of a row of panels."""
    return panels * (panel_px + _GAP_PX) - _GAP_PX


def overlay(image: UInt8[np.ndarray, "H W 3"], scores: Float32[np.ndarray, "H W"], scale: HeatScale) -> Image.Image:
    """Draw the heat map over the image, at the image's size. Higher scores are more opaque."""
    alpha = Image.fromarray(np.round(scale.levels(scores) * 255 * OVERLAY_OPACITY).astype(np.uint8))
    return Image.composite(Image.fromarray(scale.colours(scores)), Image.fromarray(image), alpha)


def stack_rows(
    rows: Sequence[tuple[str, Image.Image]], headings: Sequence[str], scale: HeatScale, columns: int = 1
) -> Image.Image:
    """Return one picture with all rows, their captions below them, headings, and the colour bar.

    The rows fill `columns` columns from left to right, then downwards. The headings are repeated over each column.
    """
    width = max(row.width for _, row in rows)
    font, line = ImageFont.load_default(15), 24
    lines = [rows[first : first + columns] for first in range(0, len(rows), columns)]
    heights = [max(row.height for _, row in one) for one in lines]
    step = width + 4 * _GAP_PX
    picture = Image.new("RGB", (columns * step - 4 * _GAP_PX, 2 * line + sum(heights) + len(lines) * line), _PAPER_RGB)
    draw = ImageDraw.Draw(picture)
    for column in range(columns):
        for number, heading in enumerate(headings):
            left = column * step + number * (width + _GAP_PX) / len(headings) + 2
            draw.text((left, 4), heading, fill=(0, 0, 0), font=font)
    top = line
    for one, height in zip(lines, heights, strict=True):
        for column, (caption, row) in enumerate(one):
            picture.paste(row, (column * step + (width - row.width) // 2, top))
            draw.text((column * step + 2, top + height + 3), caption, fill=(60, 60, 60), font=font)
        top += height + line
    left = 2.0
    for text in (f"heat map: {scale.low:.3g} or less", None, f"{scale.high:.3g} or more, one scale for all"):
        if text is None:
            picture.paste(Image.fromarray(_HEAT_RGB[None]).resize((96, 12)), (round(left) + 6, top + 5))
            left += 108
        else:
            draw.text((left, top + 3), text, fill=(60, 60, 60), font=font)
            left += draw.textlength(text, font=font)
    return picture


def colour_bar_uri() -> str:
    """Return the heat map's colours from low (left) to high (right), as a data URI."""
    return png_uri(Image.fromarray(_HEAT_RGB[None]))


def _fitted(shape_hw: tuple[int, ...], side_px: int) -> tuple[int, int]:
    """Return width and height, in this order, of an image fitted into a square of `side_px`."""
    height, width = shape_hw[:2]
    longer = max(height, width)
    return max(1, round(width * side_px / longer)), max(1, round(height * side_px / longer))


def _resized(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> Image.Image:
    # much larger images are first reduced by a box filter: it looks the same and is many times faster
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _resized_map(scores: Float32[np.ndarray, "h w"], size: tuple[int, int]) -> Float32[np.ndarray, "H W"]:
    return np.asarray(Image.fromarray(scores).resize(size, Image.Resampling.BILINEAR))


def _outline(panel: Image.Image, mask: Bool[np.ndarray, "H W"]) -> None:
    """Draw the outline of the mask on the panel, with smooth edges and a dark rim for contrast."""
    block = -(-max(mask.shape) // _CONTOUR_PX)
    small = block_reduce(mask, block, np.any) if block > 1 else mask
    size = (panel.width * _SUPERSAMPLE, panel.height * _SUPERSAMPLE)
    scale = np.array([size[0] * block / mask.shape[1], size[1] * block / mask.shape[0]])
    width = max(4, round(max(size) / 110))
    ink, rim = Image.new("L", size), Image.new("L", size)
    # a margin of one pixel closes outlines at the edge; find_contours has pixel centres at whole numbers
    for contour in find_contours(np.pad(small, 1).astype(np.float32), 0.5):
        points = [(float(x), float(y)) for x, y in (contour[:, ::-1] - 0.5) * scale]
        for layer, pen in ((rim, width + 4), (ink, width)):
            draw = ImageDraw.Draw(layer)
            draw.line(points, fill=255, width=pen, joint="curve")
            # a region smaller than the pen would have no visible line
            draw.circle(points[0], pen / 2, fill=255)
    for layer, fill in ((rim, (0, 0, 0)), (ink, OUTLINE_RGB)):
        panel.paste(fill, (0, 0), layer.resize(panel.size, Image.Resampling.BOX))
