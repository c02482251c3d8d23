"""What `adflows zsad score` leaves: scores.csv, a heat map for each image, and a report.

Images keep the names of their ids: `scratch/003` becomes maps/scratch/003.png and maps/scratch/003.tiff, so that maps
can be evaluated beside masks that lie in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from medad.base.errors import CaseFailure
from medad.base.storage import disk_full_as_user_error, write_bytes
from medad.base.text import escape_bad_bytes
from medad.reporting.failures import failure_rows
from medad.reporting.tables import write_csv
from zsad.clip.models import EncoderInfo, describe_encoder
from zsad.config.run import Variant, ZsadSettings
from zsad.data.images import read_image, resize_map
from zsad.data.labelled import LabelledImage
from zsad.reports.pictures import overlay
from zsad.reports.run.data import LoadedCategory, load_category
from zsad.reports.run.document import ColourScale, notices_of
from zsad.reports.run.report import colour_scale, heat_scale, write_pages
from zsad.steps.results import CategoryResult

MapFormat = Literal["png", "tiff", "npy"]

MAPS = "maps"
ABOUT = "about.txt"
"""In the folder of maps: what they are, for .npy files, which cannot say it themselves."""
PNG_SIDE_PX = 2048
"""A larger image's heat map PNG is made smaller; the float map is not."""


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
    """Write scores.csv, maps/ID.png and .tiff, or .npy, report.html, report.json and preview.png.

    Maps and scores are those of the lowest seed and the last variant. Float maps hold float32 at the image file's own
    size, higher is more anomalous; the PNG is the same map in colours over the image, on one scale for all images.
    TIFF and PNG say whose maps they are in their description, beside .npy files maps/about.txt does; each row of
    scores.csv names the encoder.

    Parameters
    ----------
    out
        An existing folder.
    settings, failures, versions, notes
        As for `zsad.reports.run.report.write_report`. Failed images are in scores.csv too, without a score.
    category
        None when no image could be scored.
    formats
        Of the maps: `png` for the eye; `tiff` and `npy` for programs, of which `adflows zsad evaluate` takes one a map.
    on_progress
        Called with the maps done, and their number.

    Raises
    ------
    InputError
        A result's file, or an image, is missing or damaged.
    DiskFullError
        No room to write.
    """
    variant = settings.score.variants[-1]
    loaded = None if category is None else load_category(category, settings.score.variants)
    scale = None if loaded is None or not loaded.images else colour_scale([loaded], variant)
    rows: list[dict[str, Any]] = []
    encoder = describe_encoder(settings.encoder)
    if loaded is not None and scale is not None:
        made_by = loaded.encoder(settings.encoder)
        encoder = made_by.description
        about = _about(variant, made_by, settings)
        if "npy" in formats:
            (out / MAPS).mkdir(exist_ok=True)
            write_bytes(out / MAPS / ABOUT, (about + "\n").encode())
        for done, image in enumerate(loaded.images, start=1):
            _write_maps(out / MAPS, loaded, image, settings, scale, formats, about)
            if on_progress is not None:
                on_progress(done, len(loaded.images))
        rows += _score_rows(loaded, settings)
    rows += _failure_rows(failures, settings)
    write_csv(out / "scores.csv", [row | {"encoder": encoder} for row in rows])
    write_pages(
        out,
        settings=settings,
        categories=[] if category is None else [category],
        failures=failures,
        versions=versions,
        notes=notes,
    )


def _write_maps(
    folder: Path,
    category: LoadedCategory,
    image: LabelledImage,
    settings: ZsadSettings,
    scale: ColourScale,
    formats: Sequence[MapFormat],
    about: str,
) -> None:
    scores = category.score_map(image, scale.variant, settings.evaluation)
    height, width = category.size_hw(image)
    # no with_suffix: an id may hold dots
    base = folder / image.id
    with disk_full_as_user_error(base):
        base.parent.mkdir(parents=True, exist_ok=True)
        if "png" in formats:
            shrink = min(1.0, PNG_SIDE_PX / max(height, width))
            shown_hw = (max(1, round(height * shrink)), max(1, round(width * shrink)))
            pixels = Image.fromarray(read_image(image.path)).resize(shown_hw[::-1], Image.Resampling.BICUBIC)
            picture = overlay(np.asarray(pixels), resize_map(scores, shown_hw), heat_scale(scale))
            text = PngInfo()
            text.add_itxt("Description", about)
            picture.save(base.with_name(f"{base.name}.png"), pnginfo=text)
        if {"tiff", "npy"} & set(formats):
            full = resize_map(scores, (height, width))
            if "npy" in formats:
                np.save(base.with_name(f"{base.name}.npy"), full, allow_pickle=False)
            if "tiff" in formats:
                # uncompressed, which every reader of TIFF takes
                tags = {TiffImagePlugin.IMAGEDESCRIPTION: about}
                Image.fromarray(full).save(base.with_name(f"{base.name}.tiff"), "TIFF", tiffinfo=tags)


def _about(variant: Variant, encoder: EncoderInfo, settings: ZsadSettings) -> str:
    """What a map is and who made it, in one line."""
    notices = [notice.text for notice in notices_of(settings, [encoder])]
    what = f"Anomaly map, higher is more anomalous. System: {variant}. Encoder: {encoder.description}."
    return " ".join([what, *notices])


def _score_rows(category: LoadedCategory, settings: ZsadSettings) -> Iterator[dict[str, Any]]:
    variant = settings.score.variants[-1]
    threshold = category.evaluated[category.shown_seed].variants[variant].threshold
    for image in category.images:
        score = category.image_scores[category.shown_seed][image.sha256][variant]
        height, width = category.size_hw(image)
        yield {
            "id": image.id,
            "file": "" if settings.data.pseudonyms else escape_bad_bytes(image.path.name),
            "score": score,
            "threshold": None if threshold is None else threshold.value,
            "flagged": None if threshold is None else int(score >= threshold.value),
            "width_px": width,
            "height_px": height,
            "problem": "",
        }


def _failure_rows(failures: Sequence[CaseFailure], settings: ZsadSettings) -> Iterator[dict[str, Any]]:
    for failure in failure_rows(failures, hide_files=settings.data.pseudonyms, images=True):
        yield {
            "id": failure["id"],
            "file": failure["file"],
            "score": None,
            "threshold": None,
            "flagged": None,
            "width_px": None,
            "height_px": None,
            "problem": failure["rule"],
        }
