"""Say what is odd about the pixels of an image that was read, for notes in a report.

An image with a note is scored. Equal oddities have equal notes, so that a report can count them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from zsad.data.images import FORMATS, JPEG_SUFFIXES

UNIFORM_SHARE = 0.995
"""Share of pixels within `UNIFORM_LEVELS` of the median above which a frame counts as almost uniform."""
UNIFORM_LEVELS = 2
MOST_BITS = 14
"""Largest number of used bits for which a note says that a 16-bit image is dark."""

_MOST_PAGES = 64
_SAMPLE_PIXELS = 1 << 18
_MUCH_SMALLER = 0.5
_DESCRIPTION = 270
_CHANNELS = re.compile(r'(?:^|\s)channels=(\d+)|SizeC="(\d+)"')
_ENDINGS = {
    "PNG": (".png",),
    "JPEG": JPEG_SUFFIXES,
    "MPO": JPEG_SUFFIXES,
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}


def pixel_notes(path: Path, pixels: UInt8[np.ndarray, "H W 3"]) -> tuple[str, ...]:
    """Return notes on an image that `zsad.data.images.read_image` has read. Only the file's header is read again."""
    notes: list[str] = []
    # the image was read before, so an error here only means that a note is missing
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        notes += _notes_on_format(image, path)
        notes += _notes_on_depth(image, pixels)
        notes += _notes_on_pages(image)
    if is_uniform(pixels):
        notes.append("Almost uniform frame, in which there is nothing to compare")
    return tuple(notes)


def is_uniform(pixels: UInt8[np.ndarray, "H W 3"]) -> bool:
    """Return whether nearly all pixels of a frame have the same brightness, as with a lens cap on."""
    step = max(1, int(np.sqrt(pixels.shape[0] * pixels.shape[1] / _SAMPLE_PIXELS)))
    grey = pixels[::step, ::step].mean(axis=2)
    return bool((np.abs(grey - np.median(grey)) <= UNIFORM_LEVELS).mean() >= UNIFORM_SHARE)


def _notes_on_format(image: Image.Image, path: Path) -> Iterator[str]:
    """Yield a note if the content is of another format than the ending."""
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    if path.suffix.lower() not in _ENDINGS.get(kind, ()):
        yield f"Read as {kind}, which is not what the ending {path.suffix or '(none)'} says"


def _notes_on_depth(image: Image.Image, pixels: UInt8[np.ndarray, "H W 3"]) -> Iterator[str]:
    """Yield a note if an image of 16 bits uses fewer. Only its upper 8 bits were read."""
    sixteen = image.mode.startswith("I;16") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    bits = 8 + int(pixels.max()).bit_length()
    if sixteen and 8 < bits <= MOST_BITS:
        yield f"Fills only {bits} of its 16 bits, so it was read dark; save it with 8 bits, or use all 16"
    elif sixteen and bits == 8:
        yield "Fills only 8 of its 16 bits or fewer, so it was read black; save it with 8 bits, or use all 16"


def _notes_on_pages(image: Image.Image) -> Iterator[str]:
    """Yield a note if a file has several pages or frames. Phones' JPEG files with previews are not meant."""
    pages = getattr(image, "n_frames", 1)
    if pages == 1 or image.format == "MPO":
        return
    width, height = image.size
    channels = _CHANNELS.search(str(getattr(image, "tag_v2", {}).get(_DESCRIPTION, "")))
    if channels is not None and int(channels[1] or channels[2]) > 1:
        yield f"Has its {channels[1] or channels[2]} channels as pages; only the first channel was read"
        return
    sizes = []
    for page in range(min(pages, _MOST_PAGES)):
        image.seek(page)
        sizes.append(image.size)
    largest = max(sizes, key=math.prod)
    note = f"Has {pages} pages or frames; the first was read"
    if width * height < _MUCH_SMALLER * math.prod(largest):
        note += f". It is much smaller ({width} x {height} pixels) than another ({largest[0]} x {largest[1]})"
    yield note
