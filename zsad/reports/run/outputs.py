"""Outputs of `adflows zsad score`: scores.csv, a heat map for each image, flagged images, and a report.

scores.csv is written first, so that a problem with a picture never costs the scores. Files are named by the ids of the
images: `scratch/003` becomes maps/scratch/003.png and maps/scratch/003.tiff. So maps can be evaluated with masks in
folders of the same structure.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medad.base.errors import CaseFailure
from medad.base.storage import disk_full_as_user_error, write_bytes
from medad.base.text import escape_bad_bytes, natural_order
from medad.reporting.failures import failure_rows
from medad.reporting.tables import write_csv
from zsad.clip.models import describe_encoder
from zsad.config.settings import ZsadSettings
from zsad.data.labelled import LabelledImage
from zsad.data.map_names import MAPS
from zsad.reports.run.data import LoadedCategory, load_category
from zsad.reports.run.maps import MapFormat, MapWriter
from zsad.reports.run.report import write_pages
from zsad.steps.results import CategoryResult

FLAGGED = "flagged"
"""Name of the folder with the heat maps of the flagged images, in the order of their scores."""
PROBLEMS = "problems.json"
"""Name of the list of images whose map could not be written."""
SCORES = "scores.csv"


@dataclass(frozen=True)
class _Ranked:
    """Image with its score and its place: 1 is the most anomalous."""

    rank: int
    image: LabelledImage
    score: float
    flagged: bool | None


def write_score_outputs(
    out: Path,
    *,
    settings: ZsadSettings,
    category: CategoryResult[Path] | None,
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
    formats: Sequence[MapFormat] = ("png", "tiff"),
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write scores.csv, maps (maps/ID.png, .tiff or .npy), flagged/, report.html, report.json and preview.png.

    Maps and scores are those of the last variant and the only seed (of several, the lowest). scores.csv begins with the
    highest score. An image whose map or picture cannot be written keeps its row, with the problem, and is listed in
    problems.json; all others are complete.

    Parameters
    ----------
    out
        An existing folder.
    settings, failures, versions, notes
        See `zsad.reports.run.report.write_report`. Failed images are also in scores.csv, without a score.
    category
        Results of the category. None: no image could be scored.
    formats
        Formats of the maps: `png` for people, `tiff` and `npy` for programs. `adflows zsad evaluate` reads one file
        per map, `tiff` or `npy`.
    on_progress
        Function called with the number of finished maps and the number of all maps.

    Raises
    ------
    InputError
        A file of a result is missing or damaged.
    DiskFullError
        The disk is full.
    """
    loaded = None if category is None else load_category(category, settings.method.variant_names)
    if loaded is not None and not loaded.images:
        loaded = None
    ranked = [] if loaded is None else _rank(loaded, settings)
    problems: dict[str, str] = {}
    _write_scores(out, loaded, ranked, failures, settings, problems)
    if loaded is not None:
        writer = MapWriter(out / MAPS, loaded, settings, formats)
        written = writer.write_all([one.image for one in ranked])
        for done, (one, problem) in enumerate(zip(ranked, written, strict=True), start=1):
            if problem:
                problems[one.image.id] = problem
            elif one.flagged and "png" in formats:
                _copy_flagged(out, writer, one)
            if on_progress is not None:
                on_progress(done, len(ranked))
        if problems:
            _write_scores(out, loaded, ranked, failures, settings, problems)
    write_bytes(out / PROBLEMS, (json.dumps(problems, indent=1) + "\n").encode())
    write_pages(
        out,
        settings=settings,
        categories=[] if category is None else [category],
        failures=[*failures, *(_failure(category, name, rule) for name, rule in problems.items() if category)],
        versions=versions,
        notes=notes,
    )


def _failure(category: CategoryResult[Path], image: str, rule: str) -> CaseFailure:
    return CaseFailure(f"{category.name}/{image}", "maps", rule, "", category=category.name)


def _rank(category: LoadedCategory, settings: ZsadSettings) -> list[_Ranked]:
    """Return the images in falling order of their scores."""
    variant, seed = settings.method.variant_names[-1], category.shown_seed
    threshold = category.evaluated[seed].variants[variant].threshold
    scores = {image.id: category.image_scores[seed][image.sha256][variant] for image in category.images}
    falling = sorted(category.images, key=lambda image: (-scores[image.id], natural_order(image.id)))
    return [
        _Ranked(rank, image, scores[image.id], None if threshold is None else scores[image.id] >= threshold.value)
        for rank, image in enumerate(falling, start=1)
    ]


def _write_scores(
    out: Path,
    category: LoadedCategory | None,
    ranked: Sequence[_Ranked],
    failures: Sequence[CaseFailure],
    settings: ZsadSettings,
    problems: Mapping[str, str],
) -> None:
    encoder = describe_encoder(settings.encoder) if category is None else category.encoder(settings.encoder).description
    rows: list[dict[str, Any]] = []
    if category is not None:
        rows += _score_rows(category, ranked, settings, problems)
    rows += _failure_rows(failures, settings)
    common = {"method": settings.method.display_name, "encoder": encoder}
    write_csv(out / SCORES, [row | common for row in rows])


def _copy_flagged(out: Path, writer: MapWriter, one: _Ranked) -> None:
    """Copy the heat map of a flagged image under its rank and original name."""
    source = writer.file_of(one.image, ".png")
    target = out / FLAGGED / f"{one.rank:04d}_{source.name}"
    with disk_full_as_user_error(target):
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def _score_rows(
    category: LoadedCategory, ranked: Sequence[_Ranked], settings: ZsadSettings, problems: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    variant = settings.method.variant_names[-1]
    threshold = category.evaluated[category.shown_seed].variants[variant].threshold
    for one in ranked:
        height, width = category.size_hw(one.image)
        yield {
            "rank": one.rank,
            "id": one.image.id,
            "file": "" if settings.data.pseudonyms else escape_bad_bytes(one.image.path.name),
            "score": one.score,
            "threshold": None if threshold is None else threshold.value,
            "flagged": None if one.flagged is None else int(one.flagged),
            "width_px": width,
            "height_px": height,
            "problem": problems.get(one.image.id, ""),
        }


def _failure_rows(failures: Sequence[CaseFailure], settings: ZsadSettings) -> Iterator[dict[str, Any]]:
    for failure in failure_rows(failures, hide_files=settings.data.pseudonyms, images=True):
        yield {
            "rank": None,
            "id": failure["id"],
            "file": failure["file"],
            "score": None,
            "threshold": None,
            "flagged": None,
            "width_px": None,
            "height_px": None,
            "problem": failure["rule"],
        }
