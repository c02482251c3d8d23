"""Report of a run: `report.html` for people, `report.json` and three CSV tables for programs, all from one document.

Equal inputs give equal bytes. The report contains no path; images are identified by their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medad.base.errors import CaseFailure, InputError
from medad.base.storage import atomic_path, write_bytes
from medad.base.text import natural_order
from medad.reporting.failures import failure_rows
from medad.reporting.page import jpeg_uri, settings_text
from medad.reporting.seed_statistics import Stat
from medad.reporting.tables import write_csv
from zsad.config.settings import ZsadSettings
from zsad.config.system_base import ONLY_VARIANT
from zsad.data.images import read_image
from zsad.data.masks import read_mask
from zsad.reports import charts, pictures
from zsad.reports.charts import NamedCurve, ScoreSets
from zsad.reports.page import page_environment
from zsad.reports.run.data import LoadedCategory, load_category
from zsad.reports.run.document import (
    CategoryReport,
    ColourScale,
    ReportDocument,
    ShownImage,
    make_document,
    variant_titles,
)
from zsad.reports.run.figures import macro_means, pick_images
from zsad.reports.run.gallery import GalleryPart, gallery_data, gallery_script, make_gallery
from zsad.reports.run.tables import curve_rows, result_rows, score_rows
from zsad.steps.evaluate import CurvePair
from zsad.steps.results import CategoryResult

__all__ = ["write_report"]

LISTED_IMAGES = 20
"""Number of highest-scored images listed in the HTML if labels are missing. The CSV has all images."""
PREVIEW_ROWS = 4
SCALE_QUANTILES = (0.5, 0.999)
"""Quantiles of all patch scores in the report. Heat maps show the first as black and the second as bright yellow.
Few patches are anomalous, so the lower half of the scores needs no colours."""


@dataclass(frozen=True)
class _Row:
    """An image of the report with its picture."""

    shown: ShownImage
    picture: Image.Image


def write_report(
    out: Path,
    *,
    settings: ZsadSettings,
    categories: Sequence[CategoryResult[Path]],
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Write report.html, report.json, results.csv, scores.csv and curves.csv. With scored images, write preview.png.

    Parameters
    ----------
    out
        An existing folder.
    settings
        Settings of the run. Paths in them are left out of the report.
    categories, failures
        Results and failures in any order; the report sorts them. Both may be empty.
    versions
        Versions of the programs that computed the results, by name.
    notes
        Sentences to show near the top.

    Raises
    ------
    InputError
        A file of a result is missing or damaged.
    DiskFullError
        The disk is full. Earlier reports are unchanged.
    """
    document = write_pages(
        out, settings=settings, categories=categories, failures=failures, versions=versions, notes=notes
    )
    write_csv(out / "results.csv", result_rows(document))
    write_csv(out / "scores.csv", score_rows(document))
    write_csv(out / "curves.csv", curve_rows(document))


def write_pages(
    out: Path,
    *,
    settings: ZsadSettings,
    categories: Sequence[CategoryResult[Path]],
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> ReportDocument:
    """Write the report without the CSV tables; see `write_report`. Return the document."""
    ordered = sorted(categories, key=lambda one: natural_order(one.name))
    variants = settings.method.variant_names
    loaded = [category for one in ordered if (category := load_category(one, variants)).images]
    variant = variants[-1]
    scale = colour_scale(loaded, variant)
    # smaller pictures for more categories: a report of 100 categories should be only a few megabytes
    panel_px, quality, misses = (
        (256, 82, 2) if len(loaded) <= 8 else (208, 75, 2) if len(loaded) <= 20 else (144, 65, 1)
    )
    pictured = [_rows(one, variant, settings, scale, panel_px, misses) for one in loaded] if scale else []
    encoders = [one.encoder(settings.encoder) for one in loaded]
    reports = [
        one.report(variants, encoder, [row.shown for row in rows])
        for one, encoder, rows in zip(loaded, encoders, pictured, strict=True)
    ]
    document = make_document(
        settings,
        reports,
        encoders,
        macro_means(reports, variants),
        scale,
        failure_rows(failures, hide_files=settings.data.pseudonyms, images=True),
        versions,
        notes,
    )
    write_bytes(out / "report.json", (document.model_dump_json(indent=1) + "\n").encode())
    uris = [[jpeg_uri(row.picture, quality) for row in rows] for rows in pictured]
    gallery = make_gallery(out, loaded, settings, scale, document.name)
    page = render_html(document, settings, uris, [_chart(one, variant) for one in loaded], gallery)
    write_bytes(out / "report.html", page.encode())
    if scale:
        _write_preview(out / "preview.png", document, pictured, scale)
    return document


def render_html(
    document: ReportDocument,
    settings: ZsadSettings,
    row_uris: Sequence[Sequence[str]],
    chart_uris: Sequence[str],
    gallery: Sequence[GalleryPart] = (),
) -> str:
    """Render the document as one self-contained page. `row_uris` has a picture for each shown image by category.

    The page shows the gallery's images, or links to the gallery's own pages.
    """
    environment = page_environment("zsad.reports.run")
    shown_as = {ONLY_VARIANT: settings.method.display_name}
    environment.filters.update(plain=_number, count=_count, shown=lambda variant: shown_as.get(variant, variant))
    script, digest = gallery_script()
    here = [part for part in gallery if not part.file]
    return environment.get_template("report_template.html").render(
        doc=document,
        gallery=gallery,
        gallery_json=gallery_data(here) if here else "",
        gallery_script=script,
        more_scripts=digest if here else "",
        row_uris=row_uris,
        chart_uris=chart_uris,
        listed=[_highest_scored(category) for category in document.categories],
        colour_bar=pictures.colour_bar_uri(),
        variants=variant_titles(settings.method),
        method=settings.method.display_name,
        settings_yaml=settings_text(document.settings),
    )


def colour_scale(categories: Sequence[LoadedCategory], variant: str) -> ColourScale | None:
    """Return one colour scale for all heat maps of a report, from the scores of all patches. None: no images."""
    scores = [one.patch_map(image, variant).ravel() for one in categories for image in one.images]
    if not scores:
        return None
    low, high = np.quantile(np.concatenate(scores), SCALE_QUANTILES).tolist()
    return ColourScale(variant=variant, seed=min(one.shown_seed for one in categories), low=low, high=high)


def heat_scale(scale: ColourScale) -> pictures.HeatScale:
    """Return the scale in the type that `zsad.reports.pictures` uses."""
    return pictures.HeatScale(scale.low, scale.high)


def _rows(
    category: LoadedCategory, variant: str, settings: ZsadSettings, scale: ColourScale, panel_px: int, misses: int
) -> list[_Row]:
    """Return the images of a category to show. Only these are read from disk."""
    images = category.images
    evaluated = category.evaluated[category.shown_seed]
    scores_by_digest = category.image_scores[category.shown_seed]
    scores = [scores_by_digest[image.sha256][variant] for image in images]
    threshold = evaluated.variants[variant].threshold
    unusable = {problem.sha256 for problem in evaluated.problems}
    rows = []
    for rank, i in pick_images([image.id for image in images], scores, [image.anomalous for image in images], misses):
        image = images[i]
        mask = None
        reference = None if variant in {"text", "text_tta"} else category.reference(image)
        try:
            pixels = read_image(image.path)
            reference_pixels = None if reference is None else read_image(reference.path)
            if image.mask is not None and image.sha256 not in unusable:
                mask = read_mask(image.mask, category.size_hw(image))
        except InputError:
            continue  # a file that was moved away since the scoring cannot be shown; its scores are in the tables
        output = pictures.ImageView(
            image=pixels,
            scores=category.score_map(image, variant, settings.evaluation),
            mask=mask,
            reference=reference_pixels,
        )
        shown = ShownImage(
            rank=rank,
            id=image.id,
            defect=image.defect,
            anomalous=image.anomalous,
            score=scores[i],
            flagged=None if threshold is None else scores[i] >= threshold.value,
            reference=None if reference is None else reference.id,
            masked=mask is not None,
        )
        rows.append(_Row(shown, pictures.panel_row(output, heat_scale(scale), panel_px)))
    return rows


def _chart(category: LoadedCategory, variant: str) -> str:
    scores_by_digest = category.image_scores[category.shown_seed]
    figures = category.evaluated[category.shown_seed].variants[variant]

    def scores(label: bool | None) -> list[float]:
        return [scores_by_digest[image.sha256][variant] for image in category.images if image.anomalous is label]

    def named(kind: str) -> list[NamedCurve]:
        pairs: list[tuple[str, CurvePair | None, bool]] = [
            ("images", category.curves.image, False),
            ("pixels", category.curves.pixel, True),
        ]
        found = []
        for label, pair, dashed in pairs:
            curve = getattr(pair, kind) if pair else None
            if curve:
                found.append(NamedCurve(label, (curve.x, curve.y), dashed))
        return found

    sets = ScoreSets(
        normal=scores(False),
        anomalous=scores(True),
        unlabelled=scores(None),
        deployable_threshold=figures.threshold.value if figures.threshold else None,
        oracle_threshold=figures.image.f1max_threshold if figures.image else None,
    )
    # without normal images, precision is always 1, so the curve has no information
    return charts.category_chart(sets, named("roc"), named("pr") if sets.normal else [])


def _highest_scored(category: CategoryReport) -> list[tuple[str, float, bool | None]]:
    """Return id, score and flag of the highest-scored images, if labels are missing."""
    if not category.unlabelled:
        return []
    figures = category.variants[-1]
    threshold = figures.seeds[category.shown_seed].deployable_threshold
    falling = sorted(
        ((image.scores[figures.variant][category.shown_seed], image.id) for image in category.images),
        key=lambda one: (-one[0], natural_order(one[1])),
    )
    return [(name, score, None if threshold is None else score >= threshold) for score, name in falling[:LISTED_IMAGES]]


def _write_preview(
    path: Path, document: ReportDocument, pictured: Sequence[Sequence[_Row]], scale: ColourScale
) -> None:
    """Write a picture with one image of each of the first categories: the median anomalous or the highest-scored."""
    kinds = [notice.kind for notice in document.notices if notice.kind != "published"]
    tag = f" ({', '.join(kinds)})" if kinds else ""
    captioned = []
    for category, rows in zip(document.categories, pictured, strict=True):
        if not rows:
            continue
        order = ("median anomalous", "highest", "median normal")
        row = min(rows, key=lambda one: order.index(one.shown.rank) if one.shown.rank in order else len(order))
        captioned.append((f"{category.name} {row.shown.id}: {row.shown.rank}{tag}", row))
    captioned = captioned[:PREVIEW_ROWS]
    if not captioned:
        return
    image = "image; blue: true mask" if any(row.shown.masked for _, row in captioned) else "image"
    referenced = all(row.shown.reference for _, row in captioned)
    picture = pictures.stack_rows(
        [(caption, row.picture) for caption, row in captioned],
        [image, "reference", "heat map"] if referenced else [image, "heat map"],
        heat_scale(scale),
        columns=2 if len(captioned) == PREVIEW_ROWS and not referenced else 1,
    )
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def _number(stat: Stat | None) -> str:
    if stat is None:
        return "too few images"
    return f"{stat.mean:.4g}" + ("" if stat.sd is None else f" ± {stat.sd:.2g}")


def _count(stat: Stat | None, of: int | None = None) -> str:
    if stat is None:
        return "–"
    number = f"{stat.mean:.0f}" if not stat.sd else f"{stat.mean:.1f} ± {stat.sd:.1f}"
    return number if of is None else f"{number} of {of}"
