"""Charts of reports as SVG: a histogram of a category's scores, and its ROC and precision-recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medad.reporting.charts import chart_style, svg_text, svg_uri

NORMAL_COLOUR, ANOMALOUS_COLOUR = "#0072b2", "#d55e00"
"""Blue and vermilion from Okabe and Ito's palette."""
BINS = 30

Points = tuple[Sequence[float], Sequence[float]]
"""Coordinates x and y of a curve."""


@dataclass(frozen=True)
class ScoreSets:
    """The image scores of a category by label; lists may be empty."""

    normal: Sequence[float]
    anomalous: Sequence[float]
    unlabelled: Sequence[float]
    deployable_threshold: float | None
    oracle_threshold: float | None


@dataclass(frozen=True)
class NamedCurve:
    """A curve with its label in the legend."""

    label: str
    points: Points
    dashed: bool = False


def category_chart(scores: ScoreSets, roc: Sequence[NamedCurve], pr: Sequence[NamedCurve]) -> str:
    """Return one row of charts as a data URI: histogram of scores, then the ROC and precision-recall curves, if any."""
    panels = 1 + bool(roc) + bool(pr)
    with chart_style():
        width, left = 4.4 + 3.1 * (panels - 1), 4.9
        figure = Figure(figsize=(width, 2.9))
        # positions in inches: matplotlib's layout takes longer than plotting
        _histogram(figure.add_axes((0.5 / width, 0.16, 3.7 / width, 0.74)), scores)
        for curves, names, diagonal in (
            (roc, ("ROC", "false positive rate", "true positive rate"), True),
            (pr, ("Precision and recall", "recall", "precision"), False),
        ):
            if curves:
                _curves(figure.add_axes((left / width, 0.16, 2.15 / width, 0.74)), curves, *names, diagonal=diagonal)
                left += 3.1
        return svg_uri(svg_text(figure))


def _histogram(axes: Axes, scores: ScoreSets) -> None:
    sets = [
        (f"normal ({len(scores.normal)})", scores.normal, NORMAL_COLOUR),
        (f"anomalous ({len(scores.anomalous)})", scores.anomalous, ANOMALOUS_COLOUR),
        (f"no label ({len(scores.unlabelled)})", scores.unlabelled, "#777777"),
    ]
    everything = np.concatenate([np.asarray(values, dtype=np.float64) for _, values, _ in sets])
    edges = _edges(everything)
    for label, values, colour in sets:
        if len(values):
            axes.stairs(np.histogram(values, edges)[0], edges, fill=True, color=colour, alpha=0.55, label=label)
    for name, threshold, style in (
        ("deployable threshold", scores.deployable_threshold, "-"),
        ("oracle threshold (F1max)", scores.oracle_threshold, ":"),
    ):
        if threshold is not None:
            axes.axvline(threshold, color="#222222", linewidth=1.2, linestyle=style, label=name)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7.5)
    axes.set_title("Image scores", fontsize=9, loc="left")
    axes.set_xlabel("score")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _edges(values: np.ndarray) -> np.ndarray:
    """Return edges of equal bins over the range of the values. An empty range is widened a little."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    margin = max(1e-6, 1e-3 * abs(low)) if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300) else 0.0
    return np.linspace(low - margin, high + margin, BINS + 1)


def _curves(axes: Axes, curves: Sequence[NamedCurve], title: str, x: str, y: str, *, diagonal: bool) -> None:
    if diagonal:
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    for curve in curves:
        axes.plot(
            *curve.points,
            color=NORMAL_COLOUR if curve.dashed else ANOMALOUS_COLOUR,
            linewidth=1.3,
            linestyle="--" if curve.dashed else "-",
            label=curve.label,
        )
    ticks = (0.0, 0.5, 1.0)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=ticks, yticks=ticks)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, linewidth=0.4, color="#dddddd")
    axes.legend(frameon=False, fontsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
