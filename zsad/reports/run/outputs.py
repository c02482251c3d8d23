"""Outputs of `adflows zsad score`: scores.csv, a heat map for each image, and a report.

Files are named by the ids of the images: `scratch/003` becomes maps/scratch/003.png and maps/scratch/003.tiff. So maps
can be evaluated with masks in folders of the same structure.
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
"""Name of a file in the folder of maps that describes them, because .npy files have no description."""
PNG_SIDE_PX = 2048
"""Longer side to which the heat map PNG of a larger image is reduced. The float map is not reduced."""


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
    """Write scores.csv, maps (maps/ID.png, .tiff or .npy), report.html, report.json and preview.png.

    Maps and scores are those of the last variant and the only seed (of several, the lowest). Float maps are float32 at
    the size of the image file; higher is more anomalous. The PNG shows the same map in colours over the image, with one
    scale for all images. The description in TIFF and PNG files names the system and the encoder; maps/about.txt does so
    for .npy files. Each row of scores.csv names the encoder.

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
        A file of a result or an image is missing or damaged.
    DiskFullError
        The disk is full.
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
    # with_suffix is not used, because an id may contain dots
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
                # uncompressed, because every TIFF reader can read that
                tags = {TiffImagePlugin.IMAGEDESCRIPTION: about}
                Image.fromarray(full).save(base.with_name(f"{base.name}.tiff"), "TIFF", tiffinfo=tags)


def _about(variant: Variant, encoder: EncoderInfo, settings: ZsadSettings) -> str:
    """Return one line that describes a map: its meaning, the system and the encoder."""
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
