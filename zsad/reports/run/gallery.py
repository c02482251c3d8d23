"""The gallery of a report: every image of a run with its score and its map, small enough for a page.

A page has at most `PAGE_IMAGES` images, and at most 40 MB. A run with more images gets several pages.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from medad.base.errors import InputError
from medad.base.storage import write_bytes
from medad.base.text import natural_order
from medad.reporting.page import data_uri, png_uri, script_of
from zsad.config.settings import ZsadSettings
from zsad.data.images import read_image, resize_map
from zsad.data.labelled import LabelledImage
from zsad.data.map_names import MAPS, file_parts, folder_name
from zsad.reports import pictures
from zsad.reports.page import page_environment
from zsad.reports.run.data import LoadedCategory
from zsad.reports.run.document import ColourScale

FOLDER = "gallery"
"""Folder of the pages of a run with more images than a page may have."""
PAGE_IMAGES = 2000
TOTAL_BYTES, LEAST_BYTES, MOST_BYTES = 12_000_000, 14_000, 80_000
"""Bytes for the pictures of a page, if it has few images, and the least and most for each image with its map."""
SIDES_AND_QUALITIES = ((640, 82), (512, 80), (384, 78), (288, 75), (224, 70), (160, 65), (128, 50), (96, 40), (64, 30))
"""Longer side of a picture and JPEG quality, tried in this order."""
MAP_SIDE_PX = 64
"""Longer side of a map. Maps are smoothed, so more pixels would show nothing new."""
_THREADS = 2


@dataclass(frozen=True)
class GalleryPart:
    """Images of one category on one page, highest score first."""

    category: str
    title: str
    first: int
    """Rank of the first image in its category, from 1."""
    images: tuple[dict[str, Any], ...]
    threshold: float | None
    file: str = ""
    """Address of the page relative to the report. Empty: the report itself shows the images."""

    @property
    def count(self) -> int:
        return len(self.images)


def make_gallery(
    out: Path, categories: Sequence[LoadedCategory], settings: ZsadSettings, scale: ColourScale | None, name: str
) -> list[GalleryPart]:
    """Return the gallery's parts. If there are more than `PAGE_IMAGES` images, write each part to a page of its own.

    Images whose files cannot be read any more have no picture. Raises InputError for damaged scores, and DiskFullError.
    """
    total = sum(len(one.images) for one in categories)
    if scale is None:
        return []
    if total <= PAGE_IMAGES:
        budget = _budget(total)
        return [part for one in categories for part in _parts(one, settings, scale, budget, "")]
    parts: list[GalleryPart] = []
    for one in categories:
        for part in _parts(one, settings, scale, _budget(min(len(one.images), PAGE_IMAGES)), "../"):
            there = replace(part, file=f"{FOLDER}/{len(parts) + 1}.html")
            (out / FOLDER).mkdir(exist_ok=True)
            write_bytes(out / there.file, _page(there, scale, name).encode())
            parts.append(replace(there, images=tuple({} for _ in there.images)))  # pictures need memory
    return parts


def gallery_data(parts: Sequence[GalleryPart]) -> str:
    """Return the parts as JSON that an HTML script element may contain."""
    values = [{"category": part.title, "threshold": part.threshold, "images": part.images} for part in parts]
    return json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")


def gallery_script() -> tuple[str, str]:
    """Return the gallery's script, and its source expression for the page's Content-Security-Policy."""
    return script_of("zsad.reports.run", "gallery.js")


def map_address(category: str, image: str, settings: ZsadSettings) -> str:
    """Return the address of an image's full map, relative to the report. Empty: the run writes no pictures of maps."""
    if "png" not in settings.maps:
        return ""
    # `adflows zsad score` has one category, and no folder for it
    folders = [] if settings.data.root == "-" else [folder_name(category)]
    return "/".join(map(quote, [MAPS, *folders, *file_parts(image)])) + ".png"


def _budget(images: int) -> int:
    return min(MOST_BYTES, max(LEAST_BYTES, TOTAL_BYTES // max(1, images)))


def _parts(
    category: LoadedCategory, settings: ZsadSettings, scale: ColourScale, budget: int, up: str
) -> Iterator[GalleryPart]:
    variant, seed = scale.variant, category.shown_seed
    scores = {image.sha256: category.image_scores[seed][image.sha256][variant] for image in category.images}
    order = sorted(category.images, key=lambda image: (-scores[image.sha256], natural_order(image.id)))
    threshold = category.evaluated[seed].variants[variant].threshold
    heat = pictures.HeatScale(scale.low, scale.high)

    def item(image: LabelledImage) -> dict[str, Any]:
        address = map_address(category.result.name, image.id, settings)
        return {
            "id": image.id,
            "folder": image.id.rpartition("/")[0],
            "anomalous": image.anomalous,
            "score": scores[image.sha256],
            "full": address and f"{up}{address}",
            **_pictures(category, image, settings, heat, variant, budget),
        }

    for first in range(0, len(order), PAGE_IMAGES):
        chosen = order[first : first + PAGE_IMAGES]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="gallery") as pool:
            images = tuple(pool.map(item, chosen))
        name = category.result.name
        title = name if len(order) <= PAGE_IMAGES else f"{name}, {first + 1} to {first + len(chosen)}"
        yield GalleryPart(name, title, first + 1, images, None if threshold is None else threshold.value)


def _pictures(
    category: LoadedCategory,
    image: LabelledImage,
    settings: ZsadSettings,
    scale: pictures.HeatScale,
    variant: str,
    budget: int,
) -> dict[str, Any]:
    """Return the picture and the map of an image as data URIs, together within the budget of bytes."""
    scores = category.score_map(image, variant, settings.evaluation)
    height, width = scores.shape
    shrink = min(1.0, MAP_SIDE_PX / max(height, width))
    small = resize_map(scores, (max(1, round(height * shrink)), max(1, round(width * shrink))))
    levels = Image.fromarray(np.round(scale.levels(small) * 255).astype(np.uint8))
    found = {"map": png_uri(levels), "picture": "", "size": [0, 0]}
    try:
        pixels = Image.fromarray(read_image(image.path))
    except InputError:
        return found
    most = budget - 3 * len(found["map"]) // 4
    one = pixels
    for side, quality in SIDES_AND_QUALITIES:
        if side * side > 12 * most:  # most photographs of this size do not fit
            continue
        one.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        buffer = io.BytesIO()
        one.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= most:
            break
    return found | {"picture": data_uri("image/jpeg", buffer.getvalue()), "size": list(one.size)}


def _page(part: GalleryPart, scale: ColourScale, name: str) -> str:
    """Return the page of one part."""
    script, digest = gallery_script()
    return (
        page_environment("zsad.reports.run")
        .get_template("gallery_page.html")
        .render(
            doc=SimpleNamespace(name=name, notes=(), part=part),
            gallery=[part],
            gallery_json=gallery_data([part]),
            gallery_script=script,
            more_scripts=digest,
            colour_bar=pictures.colour_bar_uri(),
            scale=scale,
        )
    )
