"""Parts of all charts: one style, axes without frames, and figures as SVG with equal bytes for equal charts."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medad.reporting.page import data_uri


def chart_style(font_size: int = 9) -> AbstractContextManager[None]:
    """Return the matplotlib settings in which charts are created and saved. The font size is in points."""
    # without a salt, ids within an SVG are random
    return matplotlib.rc_context({"svg.hashsalt": "adflows", "svg.fonttype": "none", "font.size": font_size})


def style_axes(axes: Axes) -> None:
    """Draw a thin grid, and no frame at the top and at the right."""
    axes.grid(visible=True, linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG text. Call it inside `chart_style`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def svg_uri(svg: str) -> str:
    """Return SVG text as a data URI."""
    return data_uri("image/svg+xml", svg.encode())
