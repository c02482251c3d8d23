"""Charts of a comparison: lines for its ablations, and an overview of the systems."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medad.reporting.charts import chart_style, svg_text, svg_uri
from medad.reporting.seed_statistics import Stat
from zsad.reports.charts import ANOMALOUS_COLOUR, NORMAL_COLOUR
from zsad.reports.published import Quoted

SMALLEST_SPAN = 1.0
"""Smallest range of the y axis, in percent, so that a flat line looks flat."""
DOTS_DPI = 120


@dataclass(frozen=True)
class Panel:
    """One metric against the varied parameter. Published figures are separate marks, not on the line."""

    title: str
    x: Sequence[float]
    stats: Sequence[Stat | None]
    published: Sequence[Quoted | None]


@dataclass(frozen=True)
class Dots:
    """One metric of all systems, in the order of the rows."""

    title: str
    stats: Sequence[Stat | None]


def line_chart(panels: Sequence[Panel], varied: str) -> str:
    """Return panels in a row as an SVG data URI: means as a line, mean +- sd as a band, published as diamonds."""
    with chart_style():
        width = 3.3 * len(panels)
        figure = Figure(figsize=(width, 2.9))
        for number, panel in enumerate(panels):
            axes = figure.add_axes(((0.6 + 3.3 * number) / width, 0.17, 2.5 / width, 0.72))
            _lines(axes, panel, varied)
        return svg_uri(svg_text(figure))


def _lines(axes: Axes, panel: Panel, varied: str) -> None:
    known = [(x, stat) for x, stat in zip(panel.x, panel.stats, strict=True) if stat is not None]
    x = np.array([one for one, _ in known])
    mean = np.array([100 * stat.mean for _, stat in known])
    sd = np.array([100 * (stat.sd or 0.0) for _, stat in known])
    if known:
        axes.fill_between(x, mean - sd, mean + sd, color=ANOMALOUS_COLOUR, alpha=0.2, linewidth=0)
        axes.plot(x, mean, color=ANOMALOUS_COLOUR, marker="o", markersize=3.5, linewidth=1.3, label="here, mean ± sd")
    printed = [(one, quoted) for one, quoted in zip(panel.x, panel.published, strict=True) if quoted is not None]
    if printed:
        axes.errorbar(
            [one for one, _ in printed],
            [quoted.mean for _, quoted in printed],
            yerr=[quoted.sd or 0.0 for _, quoted in printed],
            color=NORMAL_COLOUR,
            marker="D",
            markerfacecolor="none",
            linestyle="none",
            linewidth=0.9,
            label="published, MVTec AD",
        )
    low, high = axes.get_ylim()
    if high - low < SMALLEST_SPAN:
        middle = (low + high) / 2
        axes.set_ylim(middle - SMALLEST_SPAN / 2, middle + SMALLEST_SPAN / 2)
    if known or printed:
        axes.legend(frameon=False, fontsize=7.5)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel(varied)
    axes.set_ylabel("%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)


def overview_png(title: str, names: Sequence[str], panels: Sequence[Dots]) -> bytes:
    """Return a PNG with one panel per metric: the systems' means with bars of one sd."""
    with chart_style():
        longest = max(map(len, names), default=0)
        left = 0.4 + 0.075 * longest
        width, height = left + 3.0 * len(panels), 1.1 + 0.3 * max(1, len(names))
        figure = Figure(figsize=(width, height), dpi=DOTS_DPI)
        for number, panel in enumerate(panels):
            bounds = ((left + 3.0 * number) / width, 0.55 / height, 2.7 / width, (height - 1.1) / height)
            axes = figure.add_axes(bounds)
            for row, stat in enumerate(panel.stats):
                if stat is not None:
                    axes.errorbar(
                        100 * stat.mean, row, xerr=100 * (stat.sd or 0.0), color=ANOMALOUS_COLOUR, marker="o", capsize=2
                    )
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            axes.set_title(panel.title, fontsize=9, loc="left")
            axes.set_xlabel("%")
            axes.grid(visible=True, linewidth=0.4, color="#dddddd")
            axes.spines[["top", "right"]].set_visible(False)
        figure.text(0.01, 1 - 0.22 / height, title, fontsize=9, weight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
