"""Code that the pages of all reports share: the template environment and the format of figures."""

from __future__ import annotations

import jinja2
from markupsafe import Markup, escape

from medad.reporting import page as pages
from medad.reporting.seed_statistics import percent
from zsad.evaluation.metric_rows import PRO_200
from zsad.reports.published import PublishedRow, Quoted


def page_environment(room: str) -> jinja2.Environment:
    """Return an environment for the templates of `reports` and of the package `room`.

    It escapes text and adds the filters percent, quoted and heading.
    """
    environment = pages.page_environment(room)
    environment.tests["in_group"] = lambda title, group: title.startswith(group)
    environment.filters.update(percent=percent, quoted=quoted, heading=_heading)
    return environment


def published_figure(row: PublishedRow, key: str, *, pro_200_shown: bool) -> Quoted | None:
    """Return the published figure for one of our columns. The papers' PRO belongs to `pro_200` if that is shown."""
    # the papers compute PRO with a loop over 200 thresholds
    name = {"pixel_aupro": "" if pro_200_shown else "aupro", PRO_200: "aupro"}.get(key, key)
    figure: Quoted | None = getattr(row, name, None)
    return figure


def quoted(row: PublishedRow, key: str, pro_200_shown: bool) -> str:
    """Return `published_figure` as text, in percent."""
    figure = published_figure(row, key, pro_200_shown=pro_200_shown)
    if figure is None:
        return "–"
    return f"{figure.mean:.1f}" + ("" if figure.sd is None else f" ± {figure.sd:.1f}")


def _heading(title: str) -> Markup:
    """Return a metric's title without `image` or `pixel`, broken into short lines."""
    lines = title.split(" ", 1)[1].replace("F1max at oracle ", "F1max at\noracle\n").replace(" 200 ", " 200\n")
    return Markup("<br>").join(map(escape, lines.split("\n")))
