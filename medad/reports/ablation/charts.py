"""Charts of an ablation as SVG text: all rows, a sweep, the curve over epochs, the embedding. No pyplot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medad.reporting.charts import chart_style, style_axes, svg_text
from medad.reporting.seed_statistics import Stat
from medad.reports.ablation.document import EmbeddingReport

OURS, PUBLISHED = "#0072b2", "#d55e00"
KIND_STYLE = {
    "tumour": ("#d55e00", "^", "slices with tumour"),
    "healthy": ("#0072b2", "o", "slices without tumour"),
    "synthesised": ("#009e73", "x", "synthesised slices"),
}
"""Colour, marker and label of each kind. Colours are from Okabe and Ito's palette; markers differ too."""
PNG_DPI = 120


@dataclass(frozen=True)
class PublishedValue:
    """A published value, in percent."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class ChartPanel:
    """One panel: a metric for each row or value, with published values."""

    title: str
    stats: Sequence[Stat | None]
    published: Sequence[PublishedValue | None] = ()


def dots_svg(labels: Sequence[str], panels: Sequence[ChartPanel]) -> str:
    """Return a chart with one panel per metric and the rows from top to bottom.

    It shows the mean with a bar of one sd, and published values as open diamonds.
    """
    with chart_style():
        return svg_text(_dots(labels, panels, title=""))


def dots_png(title: str, labels: Sequence[str], panels: Sequence[ChartPanel]) -> bytes:
    """Return the chart of `dots_svg` as a PNG with a title."""
    with chart_style():
        buffer = io.BytesIO()
        _dots(labels, panels, title=title).savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def lines_svg(x: Sequence[float], panels: Sequence[ChartPanel], varied: str) -> str:
    """Return panels side by side: means as a line with a band of one sd, published values as diamonds with a bar."""
    with chart_style():
        figure = Figure(figsize=(3.7 * len(panels), 3.0), layout="constrained")
        for number, panel in enumerate(panels, start=1):
            _line(figure.add_subplot(1, len(panels), number), x, panel, varied)
        return svg_text(figure)


def embedding_svg(embedding: EmbeddingReport) -> str:
    """Return a scatter plot of slices along the two directions of largest variance."""
    with chart_style():
        figure = Figure(figsize=(5.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for part in embedding.slices:
            colour, marker, name = KIND_STYLE[part.kind]
            axes.scatter(part.x, part.y, s=16, c=colour, marker=marker, alpha=0.7, label=f"{name} ({len(part.x)})")
        axes.set_xlabel(f"first component ({100 * embedding.explained[0]:.0f} % of the variance)")
        axes.set_ylabel(f"second component ({100 * embedding.explained[1]:.0f} %)")
        style_axes(axes)
        axes.legend(frameon=False, fontsize=8)
        return svg_text(figure)


def _dots(labels: Sequence[str], panels: Sequence[ChartPanel], title: str) -> Figure:
    longest = max(map(len, labels), default=0)
    height = (1.3 if title else 0.9) + 0.32 * max(1, len(labels))
    figure = Figure(figsize=(0.6 + 0.08 * longest + 2.9 * len(panels), height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for row, stat in enumerate(panel.stats):
            if stat is not None:
                bar = 100 * (stat.sd or 0.0)
                axes.errorbar(100 * stat.mean, row, xerr=bar, color=OURS, marker="o", capsize=2)
        for row, printed in enumerate(panel.published):
            if printed is not None:
                axes.errorbar(
                    printed.mean,
                    row + 0.22,
                    xerr=printed.sd or 0.0,
                    color=PUBLISHED,
                    marker="D",
                    markerfacecolor="none",
                )
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels if number == 1 else [""] * len(labels))
        axes.set_title(panel.title, fontsize=9, loc="left")
        axes.set_xlabel("%")
        style_axes(axes)
    return figure


def _line(axes: Axes, x: Sequence[float], panel: ChartPanel, varied: str) -> None:
    known = [(place, stat) for place, stat in zip(x, panel.stats, strict=True) if stat is not None]
    places = np.array([place for place, _ in known])
    mean = np.array([100 * stat.mean for _, stat in known])
    sd = np.array([100 * (stat.sd or 0.0) for _, stat in known])
    if known:
        axes.fill_between(places, mean - sd, mean + sd, color=OURS, alpha=0.2, linewidth=0)
        axes.plot(places, mean, color=OURS, marker="o", markersize=3, linewidth=1.2, label="here, mean ± sd")
    published = panel.published or [None] * len(x)
    printed = [(place, one) for place, one in zip(x, published, strict=True) if one is not None]
    if printed:
        axes.errorbar(
            [place for place, _ in printed],
            [one.mean for _, one in printed],
            yerr=[one.sd or 0.0 for _, one in printed],
            color=PUBLISHED,
            marker="D",
            markerfacecolor="none",
            linestyle="none",
            linewidth=0.9,
            label="published",
        )
    if known or printed:
        axes.legend(frameon=False, fontsize=7.5)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel(varied)
    axes.set_ylabel("%")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    style_axes(axes)
