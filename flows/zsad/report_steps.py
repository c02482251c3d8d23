"""The steps that write reports and maps, and functions that create their calls.

Only the keys of these steps contain names, categories and the order of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from flows.store.references import Ref
from flows.store.step import PAGE, Call, Keyed, Step, shown
from flows.zsad.steps import label_content
from medad.base.errors import CaseFailure
from zsad.config.settings import ZsadSettings
from zsad.steps.results import AblationResult, CategoryResult, SystemResult

_DRAWING = ("jinja2", "matplotlib", "numpy", "pillow", "scipy")
_DRAWING_MAPS = (*_DRAWING, "torch")
_RUN_PAGE = (
    *PAGE,
    *(
        f"zsad/reports/run/{name}"
        for name in ("report_template.html", "gallery.html", "gallery_page.html", "gallery.js")
    ),
)
REPORT = Step("zsad-report", 1, "zsad.reports.run.report:write_report", _DRAWING_MAPS, files=_RUN_PAGE, reads=True)
MAPS = Step("zsad-maps", 1, "zsad.reports.run.outputs:write_score_outputs", _DRAWING_MAPS, files=_RUN_PAGE, reads=True)
CATEGORY_MAPS = Step("zsad-category-maps", 1, "zsad.reports.run.maps:write_category_maps", _DRAWING_MAPS, reads=True)
COMPARE_REPORT = Step(
    "zsad-compare",
    1,
    "zsad.reports.compare.report:write_compare_report",
    _DRAWING,
    files=(*PAGE, "zsad/reports/compare/compare_template.html"),
)


def category_maps(settings: ZsadSettings, category: CategoryResult[Ref]) -> Call:
    """Return the call that writes the anomaly maps of one category and one system, in the formats of the settings."""
    return CATEGORY_MAPS(settings=shown(settings), category=_category(category), formats=settings.maps)


def _category(result: CategoryResult[Ref]) -> Keyed:
    """Return a category with all that a report shows as content for a key: ids, digests, labels, results."""
    images = [[image.id, *label_content(image)] for image in result.images]
    rest = {name: getattr(result, name) for name in ("name", "text", "features", "scores", "evaluated")}
    return Keyed(result, rest | {"images": images, "normal": [[one.id, one.sha256] for one in result.normal]})


def report(
    settings: ZsadSettings,
    categories: Iterable[CategoryResult[Ref]],
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> Call:
    """Return the call that writes the report and its tables. Its key contains all that these show, also ids."""
    return REPORT(
        settings=shown(settings),
        categories=tuple(map(_category, categories)),
        failures=tuple(failures),
        versions=dict(versions),
        notes=tuple(notes),
    )


def score_outputs(
    settings: ZsadSettings,
    category: CategoryResult[Ref] | None,
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
    formats: Sequence[Literal["png", "tiff", "npy"]],
) -> Call:
    """Return the call that writes scores.csv, heat maps and a report of unlabelled images."""
    gone = [] if category is None else [image.sha256 for image in category.images if not image.path.is_file()]
    return MAPS(
        settings=shown(settings),
        category=None if category is None else Keyed(category, [_category(category), gone]),
        failures=tuple(failures),
        versions=dict(versions),
        notes=tuple(notes),
        formats=tuple(formats),
    )


def compare_report(
    settings: ZsadSettings,
    systems: Iterable[SystemResult[Ref]],
    ablations: Iterable[AblationResult[Ref]],
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> Call:
    """Return the call that writes the tables of all systems, their tests and the ablations."""
    rows = tuple(systems)
    return COMPARE_REPORT(
        settings=shown(settings),
        systems=Keyed(rows, [{"system": row.system.display_name, "categories": row.categories} for row in rows]),
        ablations=tuple(ablations),
        failures=tuple(failures),
        versions=dict(versions),
        notes=tuple(notes),
    )
