"""Anomaly maps as files: pictures for people, floats for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from medad.base.errors import InputError
from medad.base.storage import disk_full_as_user_error, write_bytes
from zsad.clip.models import EncoderInfo
from zsad.config.settings import ZsadSettings
from zsad.data.images import read_image, resize_map
from zsad.data.labelled import LabelledImage
from zsad.data.map_names import MAPS, file_parts
from zsad.reports.pictures import overlay
from zsad.reports.run.data import LoadedCategory, load_category
from zsad.reports.run.document import notices_of, variant_titles
from zsad.reports.run.report import colour_scale, heat_scale
from zsad.steps.results import CategoryResult

MapFormat = Literal["png", "tiff", "npy"]
ABOUT = "about.txt"
"""Name of a file in the folder of maps that describes them, because .npy files have no description."""
PNG_SIDE_PX = 2048
"""Longer side to which the heat map PNG of a larger image is reduced. The float map is not reduced."""
SMALL_PNG_SIDE_PX = 384
"""The same for data sets with many images and systems."""
PNG_COMPRESSION = 1
"""Level of zlib's compression. The usual 6 took five times as long and made photographs 15 % smaller."""
DRAWING_THREADS = 2
"""Number of threads that draw and write maps. Pillow releases Python's global lock while it compresses."""


class MapWriter:
    """Writer of the maps of one category: maps/ID.png, .tiff or .npy, with one colour scale.

    Maps are those of the last variant and the shown seed. Float maps are float32 at the size of the image file; higher
    is more anomalous. The PNG shows the same map in colours over the image. The description in TIFF and PNG files names
    the system and the encoder; about.txt does so for .npy files.

    Parameters
    ----------
    folder
        Folder of the maps, created if it does not exist.
    category
        Results with at least one image.
    formats
        Formats to write.
    png_side_px
        Longer side to which the PNG of a larger image is reduced.
    """

    def __init__(
        self,
        folder: Path,
        category: LoadedCategory,
        settings: ZsadSettings,
        formats: Sequence[MapFormat],
        png_side_px: int = PNG_SIDE_PX,
    ) -> None:
        self._png_side_px = png_side_px
        self._folder, self._category, self._settings, self._formats = folder, category, settings, formats
        scale = colour_scale([category], settings.method.variant_names[-1])
        if scale is None:
            raise ValueError("the category has no image")
        self._scale = scale
        self._about = _about(scale.variant, category.encoder(settings.encoder), settings)
        if "npy" in formats:
            folder.mkdir(exist_ok=True, parents=True)
            write_bytes(folder / ABOUT, (self._about + "\n").encode())

    def file_of(self, image: LabelledImage, suffix: str) -> Path:
        """Return the path of an image's map. Names that are too long for a file system are cut and get a digest."""
        parts = file_parts(image.id)
        # with_suffix is not used, because an id may contain dots
        return self._folder.joinpath(*parts[:-1], f"{parts[-1]}{suffix}")

    def write_all(self, images: Sequence[LabelledImage]) -> Iterator[str | None]:
        """Write the maps of images in a few threads. Yield what `write` returns for each, in order.

        Raises as `write`. Images that were not begun are then left out.
        """
        with ThreadPoolExecutor(DRAWING_THREADS, thread_name_prefix="maps") as pool:
            yield from pool.map(self.write, images)

    def write(self, image: LabelledImage) -> str | None:
        """Write the maps of one image. Return the problem in a few words, or None.

        Without the image file, for example because it was moved away, the float maps are still written. Raises
        DiskFullError and InputError for damaged scores.
        """
        scores = self._category.score_map(image, self._scale.variant, self._settings.evaluation)
        try:
            with disk_full_as_user_error(self._folder):
                self.file_of(image, "").parent.mkdir(parents=True, exist_ok=True)
                self._write_floats(image, scores)
                if "png" in self._formats:
                    self._write_picture(image, scores)
        except InputError as error:
            return error.rule
        except OSError as error:
            return f"its map cannot be written ({error.strerror})"
        return None

    def _write_picture(self, image: LabelledImage, scores: Float32[np.ndarray, "h w"]) -> None:
        height, width = self._category.size_hw(image)
        shrink = min(1.0, self._png_side_px / max(height, width))
        shown_hw = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        pixels = Image.fromarray(read_image(image.path)).resize(shown_hw[::-1], Image.Resampling.BICUBIC)
        picture = overlay(np.asarray(pixels), resize_map(scores, shown_hw), heat_scale(self._scale))
        text = PngInfo()
        text.add_itxt("Description", self._about)
        picture.save(self.file_of(image, ".png"), pnginfo=text, compress_level=PNG_COMPRESSION)

    def _write_floats(self, image: LabelledImage, scores: Float32[np.ndarray, "h w"]) -> None:
        if not {"tiff", "npy"} & set(self._formats):
            return
        full = resize_map(scores, self._category.size_hw(image))
        if "npy" in self._formats:
            np.save(self.file_of(image, ".npy"), full, allow_pickle=False)
        if "tiff" in self._formats:
            # uncompressed, because every TIFF reader can read that
            tags = {TiffImagePlugin.IMAGEDESCRIPTION: self._about}
            Image.fromarray(full).save(self.file_of(image, ".tiff"), "TIFF", tiffinfo=tags)


def write_category_maps(
    out: Path,
    *,
    settings: ZsadSettings,
    category: CategoryResult[Path],
    formats: Sequence[MapFormat],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the maps of one category and one system into the folder `out`/maps; see `MapWriter`.

    Images whose picture cannot be written are left out; the report on their scores lists all images.

    Raises
    ------
    InputError
        A file of a result is missing or damaged.
    DiskFullError
        The disk is full.
    """
    loaded = load_category(category, settings.method.variant_names)
    if not loaded.images:
        return
    writer = MapWriter(out / MAPS, loaded, settings, formats, SMALL_PNG_SIDE_PX)
    for done, _ in enumerate(writer.write_all(loaded.images), start=1):
        if on_progress is not None:
            on_progress(done, len(loaded.images))


def _about(variant: str, encoder: EncoderInfo, settings: ZsadSettings) -> str:
    """Return one line that describes a map: its meaning, the system and the encoder."""
    notices = [notice.text for notice in notices_of(settings, [encoder])]
    system = variant_titles(settings.method).get(variant, variant)
    name = settings.method.display_name if variant == "system" else f"{settings.method.title}, {variant}"
    what = f"Anomaly map, higher is more anomalous. System: {name} ({system}). Encoder: {encoder.description}."
    return " ".join([what, *notices])
