"""Heat map of an inserted-lesion study: sensitivity by size and contrast. No pyplot, no state."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from medad.evaluation.sensitivity import Row
from medad.reporting.charts import chart_style, svg_text, svg_uri

DPI = 120
_COLOURS = "viridis"
_DARK_BELOW = 0.6
"""Sensitivity below which the colour is dark and its text white."""


def heat_map_uri(rows: Sequence[Row]) -> str:
    """Return the heat map as an SVG data URI. Equal rows give equal bytes."""
    with chart_style():
        return svg_uri(svg_text(_heat_map(rows)))


def heat_map_png(rows: Sequence[Row]) -> bytes:
    """Return the heat map as a PNG."""
    with chart_style():
        buffer = io.BytesIO()
        _heat_map(rows).savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def size_label(size_mm: tuple[float, float]) -> str:
    """Return a size bin as shown in tables, e.g. `5–8 mm`."""
    return f"{size_mm[0]:g}–{size_mm[1]:g} mm"


def _heat_map(rows: Sequence[Row]) -> Figure:
    """Draw sizes as rows and contrasts as columns, with one panel per place or one for all places.

    The colour shows sensitivity on a fixed scale, 0..1. The text shows found/inserted. Cells without lesions are white.
    """
    places = list(dict.fromkeys(row.place for row in rows))
    contrasts = list(dict.fromkeys(row.contrast or "" for row in rows))
    sizes = list(dict.fromkeys(row.size_mm for row in rows if row.size_mm is not None))
    figure = Figure(
        figsize=(1.6 + len(places) * (0.5 + 0.75 * len(contrasts)), 1.9 + 0.42 * len(sizes)), layout="constrained"
    )
    colours = matplotlib.colormaps[_COLOURS]
    for column, place in enumerate(places, start=1):
        axes = figure.add_subplot(1, len(places), column)
        for row in rows:
            if row.place != place or row.size_mm is None:
                continue
            x, y, figures = contrasts.index(row.contrast or ""), sizes.index(row.size_mm), row.figures
            if figures.sensitivity is None:
                continue
            axes.add_patch(
                matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colours(figures.sensitivity), linewidth=0)
            )
            ink = "white" if figures.sensitivity < _DARK_BELOW else "black"
            axes.text(x, y, f"{figures.found}/{figures.inserted}", ha="center", va="center", color=ink, fontsize=8)
        axes.set_xlim(-0.5, len(contrasts) - 0.5)
        axes.set_ylim(len(sizes) - 0.5, -0.5)
        axes.set_xticks(range(len(contrasts)), [one.replace(", ", ",\n") for one in contrasts], rotation=60, ha="right")
        axes.set_yticks(range(len(sizes)), [size_label(size) for size in sizes] if column == 1 else [""] * len(sizes))
        axes.set_title(_TITLES[place], fontsize=10, loc="left")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colours)
    figure.colorbar(scale, ax=figure.axes, label="sensitivity", fraction=0.03)
    return figure


_TITLES = {"inside": "inside the liver", "rim": "at the rim", None: "all lesions"}
