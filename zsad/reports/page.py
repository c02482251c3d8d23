"""What the pages of reports share: the template environment, and how figures are written."""

from __future__ import annotations

import jinja2
from markupsafe import Markup, escape

from medad.reporting import page as pages
from medad.reporting.seed_statistics import percent
from zsad.reports.published import PublishedRow, Quoted
from zsad.reports.run.document import PRO_200


def page_environment(room: str) -> jinja2.Environment:
    """Templates of `reports` and of one of its rooms, escaped, with the filters percent, quoted and heading."""
    environment = pages.page_environment("zsad.reports", room)
    environment.tests["in_group"] = lambda title, group: title.startswith(group)
    environment.filters.update(percent=percent, quoted=quoted, heading=_heading)
    return environment


def published_figure(row: PublishedRow, key: str, *, pro_200_shown: bool) -> Quoted | None:
    """A published figure under the column of ours that it compares with: the papers' PRO under `pro_200` if shown."""
    # the papers' PRO comes from the loop over thresholds
    name = {"pixel_aupro": "" if pro_200_shown else "aupro", PRO_200: "aupro"}.get(key, key)
    figure: Quoted | None = getattr(row, name, None)
    return figure


def quoted(row: PublishedRow, key: str, pro_200_shown: bool) -> str:
    """`published_figure` as printed, in percent."""
    figure = published_figure(row, key, pro_200_shown=pro_200_shown)
    if figure is None:
        return "–"
    return f"{figure.mean:.1f}" + ("" if figure.sd is None else f" ± {figure.sd:.1f}")


def _heading(title: str) -> Markup:
    """A metric's title below `image` or `pixel`, in short lines."""
    lines = title.split(" ", 1)[1].replace("F1max at oracle ", "F1max at\noracle\n").replace(" 200 ", " 200\n")
    return Markup("<br>").join(map(escape, lines.split("\n")))
