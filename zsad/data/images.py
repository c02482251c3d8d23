"""Read images and masks, cut square crops for the encoder, and merge patch maps into maps of pixels.

An image is resized so that its shorter side is the encoder's input size. The resizing is that of open_clip's own
preprocessing (Pillow, bilinear with antialiasing, rounded to bytes). A longer image is covered by several square crops.
Their maps are merged, and overlaps are averaged. The supplement of the dual-image paper (Zhang et al., Dual-Image
Enhanced CLIP, 2024) does the same for VisA: two crops for each 3:2 image.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from medad.base.storage import reading
from zsad.data.file_kinds import TEXT_FILE, describe_file

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
AVIF_SUFFIXES = (".avif",) if "avif" in features.modules and features.check("avif") else ()
"""Suffixes of AVIF, which Pillow reads from version 11.3 on. Empty with an older one."""
HEIC_SUFFIXES = (".heic", ".heif", ".hif") if importlib.util.find_spec("pillow_heif") else ()
"""Suffixes of HEIC, which the optional library pillow-heif reads. Empty without it."""
IMAGE_SUFFIXES = (".png", *JPEG_SUFFIXES, ".bmp", ".tif", ".tiff", ".webp", *AVIF_SUFFIXES, *HEIC_SUFFIXES)
"""Suffixes of image files, in lower case."""
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", *JPEG_SUFFIXES)
"""Suffixes of masks, in lower case."""
MAX_PIXELS = 1 << 27
"""Largest number of pixels of an image (384 MiB of RGB). A larger image is refused before it is decoded."""
DECODING_THREADS = 2
"""Number of threads that decode images."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP") + ("AVIF",) * bool(AVIF_SUFFIXES) + ("HEIF",) * bool(HEIC_SUFFIXES)
"""Names of the image formats that are read, as Pillow calls them."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLES_PER_PIXEL, _PLANES = 258, 262, 277, 284
_WHITE = (255, 255, 255, 255)

S = TypeVar("S")
T = TypeVar("T")


@dataclass
class _WarningsState:
    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    saved: warnings.catch_warnings[None] | None = None


_warnings_state = _WarningsState()


@dataclass(frozen=True)
class Crops:
    """Square crops that together cover a resized image, in order along its longer side.

    A squashed image is one crop: its canvas is a square, and a map on it must be resized to the image's proportions.
    """

    canvas_hw: tuple[int, int]
    """Height and width of the resized image, px. The shorter one is `size_px`."""
    offsets: tuple[tuple[int, int], ...]
    """Top and left of each crop on the canvas, px. The first is (0, 0); the last crop ends at the canvas's end."""
    size_px: int
    """Side of every crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation with which the image is resized to the canvas."""


def read_image(path: Path, *, min_side_px: int = 1) -> UInt8[np.ndarray, "H W 3"]:
    """Read PNG, JPEG, BMP, TIFF, WebP, AVIF or HEIC as 8-bit RGB.

    Greyscale and palette images become RGB. Transparent images are laid on white, so that colours hidden under full
    transparency have no effect. Of 16 bits per channel the upper 8 are used. Data that fill only 12 of the 16 bits
    therefore become dark. EXIF orientation is applied. Of several frames or pages the first is read.
    `zsad.data.pixel_notes` says when one of these applies. AVIF needs Pillow 11.3, and HEIC needs pillow-heif.

    Raises
    ------
    InputError
        The file is missing, damaged or in another format. Or it has 32-bit pixels, more than `MAX_PIXELS` pixels or a
        side shorter than `min_side_px`.
    """
    image = decode(path, to_rgb)
    height, width = image.shape[:2]
    if min(height, width) < min_side_px:
        raise InputError(path, f"is {width} x {height} pixels; the shorter side must have at least {min_side_px}")
    return image


def map_in_threads(read: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Apply `read` to each item in several threads and return the results in order.

    Pillow releases Python's global lock while it decodes. Raises the error of the first item that fails.
    """
    with ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="images") as pool:
        return list(pool.map(read, items))


def write_png(path: Path, pixels: UInt8[np.ndarray, "H W *channels"]) -> None:
    """Write an image or a mask as PNG. Missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def read_map(path: Path) -> Float[np.ndarray, "H W"]:
    """Read an anomaly map of any tool: .npy, or a TIFF with one channel. Further axes of length 1 are dropped.

    Returns float32 if that type can represent all values of the file's type, else float64. A 64-bit TIFF is read as
    float32.

    Raises
    ------
    InputError
        The file is missing or damaged, has several channels or no pixel, or contains NaN or infinite values.
    """
    values = _read_npy(path) if path.suffix.lower() == ".npy" else decode(path, lambda image, _: np.array(image))
    if values.dtype.kind not in "fiub":
        raise InputError(path, f"the map's values are {values.dtype}, expected real numbers")
    plane = values.reshape([side for side in values.shape if side != 1]) if values.ndim > 2 else values
    if plane.ndim != 2 or not plane.size:
        raise InputError(path, f"the map has shape {values.shape}, expected height and width")
    plane = plane.astype(np.float32 if np.can_cast(plane.dtype, np.float32) else np.float64)
    if not np.isfinite(plane).all():
        raise InputError(path, "the map contains NaN or infinite values")
    return plane


def scaled_hw(height: int, width: int, size_px: int) -> tuple[int, int]:
    """Return height and width after resizing the shorter side to `size_px`.

    The longer side is rounded down, as in torchvision's Resize.
    """
    short, long = sorted((height, width))
    scaled = size_px * long // short
    return (size_px, scaled) if height <= width else (scaled, size_px)


def plan_crops(
    height: int,
    width: int,
    size_px: int,
    max_crops: int,
    path: Path | str = "image",
    *,
    fit: Literal["crops", "squash"] = "crops",
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> Crops:
    """Return the square crops of an image: one if it is square once resized, else max(2, ceil(long / short)).

    With `fit` `squash`, the image is resized to a square and is one crop, as in MuSc, APRIL-GAN and AnomalyCLIP.

    Raises
    ------
    InputError
        The image needs more than `max_crops` crops. `path` names the image in the message.
    """
    canvas = scaled_hw(height, width, size_px) if fit == "crops" else (size_px, size_px)
    long = max(canvas)
    count = 1 if long == size_px else max(2, math.ceil(long / size_px))
    if count > max_crops:
        raise InputError(
            path,
            f"is {width} x {height} pixels: so long that it needs {count} crops, limit {max_crops}; "
            "encoder.fit=squash needs one",
        )
    starts = [i * (long - size_px) // max(count - 1, 1) for i in range(count)]
    offsets = tuple((start, 0) if canvas[0] > canvas[1] else (0, start) for start in starts)
    return Crops(canvas, offsets, size_px, interpolation)


def crop_image(image: UInt8[np.ndarray, "H W 3"], crops: Crops) -> Float32[Tensor, "C 3 S S"]:
    """Resize an image to the canvas of `crops` and cut out the crops. Values are 0..1, not normalised.

    Pillow resizes with antialiasing, as the programs of the papers do.
    """
    height, width = crops.canvas_hw
    resample = Image.Resampling.BICUBIC if crops.interpolation == "bicubic" else Image.Resampling.BILINEAR
    canvas = np.asarray(Image.fromarray(image).resize((width, height), resample))
    s = crops.size_px
    cut = np.stack([canvas[top : top + s, left : left + s] for top, left in crops.offsets])
    return torch.from_numpy(cut).permute(0, 3, 1, 2).to(torch.float32).div(255)


def merge_maps(
    patch_maps: Float[Tensor, "C g g"] | Float[np.ndarray, "C g g"],
    crops: Crops,
    size_px_out: int | None = None,
    smoothing_sigma_px: float = 0.0,
    *,
    align_corners: bool = False,
) -> Float32[np.ndarray, "H W"]:
    """Merge the patch maps of an image's crops into one map.

    Each patch map is upsampled bilinearly to its crop. With `align_corners`, the centres of the corner patches are
    placed on those of the corner pixels. Overlapping crops are averaged. The canvas is then resized so that its shorter
    side is `size_px_out` (None: `crops.size_px`). Last, it is smoothed by a Gaussian of `smoothing_sigma_px` (edges
    reflected). All steps are weighted means, so values stay in the range of the patches.
    """
    # detached and on the CPU: a map is a result, and merging it is too little work for a GPU
    patches = torch.as_tensor(patch_maps).detach().to("cpu", torch.float32)
    s = crops.size_px
    tiles = functional.interpolate(patches[:, None], size=(s, s), mode="bilinear", align_corners=align_corners)[:, 0]
    if len(crops.offsets) == 1:
        canvas = tiles[0]
    else:
        canvas, cover = torch.zeros(crops.canvas_hw), torch.zeros(crops.canvas_hw)
        for tile, (top, left) in zip(tiles, crops.offsets, strict=True):
            canvas[top : top + s, left : left + s] += tile
            cover[top : top + s, left : left + s] += 1
        canvas = canvas / cover
    merged = canvas.numpy()
    if size_px_out is not None and size_px_out != s:
        merged = resize_map(merged, scaled_hw(*crops.canvas_hw, size_px_out))
    if smoothing_sigma_px > 0:
        merged = ndimage.gaussian_filter(merged, smoothing_sigma_px)
    return merged


def resize_map(scores: Float[np.ndarray, "h w"], shape_hw: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Resize a map bilinearly to height and width, antialiased if it shrinks."""
    if scores.shape == shape_hw:
        return scores
    grown = functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(scores))[None, None],
        size=shape_hw,
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    return grown[0, 0].numpy()


def mask_to_canvas(mask: Bool[np.ndarray, "H W"], canvas_hw: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Resize a mask by nearest neighbour: each new pixel has the value at its centre, so values stay boolean."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(mask.shape, canvas_hw, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def decode(path: Path, convert: Callable[[Image.Image, Path], T], formats: tuple[str, ...] = FORMATS) -> T:
    """Open, check and decode an image file with `convert`. Raises InputError for every failure.

    `convert` gets the image as EXIF turns it, with the attribute `format`.
    """
    _register_heif()
    with reading(path):
        file = path.open("rb")
    with file, _without_pillow_warnings():
        try:
            with Image.open(file, formats=formats) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(path, f"is {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
                if image.format == "PNG":
                    # Pillow decodes a PNG with wrong checksums; after verify() the file must be opened again
                    image.verify()
                _refuse_misread_tiff(image, path)
            file.seek(0)
            with Image.open(file, formats=formats) as image:
                turned = ImageOps.exif_transpose(image)
                turned.format = image.format
                return convert(turned, path)
        except InputError:
            raise
        except UnidentifiedImageError as error:
            what = describe_file(path)
            if what in {None, TEXT_FILE}:
                rest = "or its header is broken" if what is None else f"but {TEXT_FILE}"
                raise InputError(path, f"not a PNG, JPEG, BMP, TIFF, WebP or AVIF image, {rest}") from error
            raise InputError(path, f"is {what}") from error
        except Image.DecompressionBombError as error:
            raise InputError(path, f"has too many pixels; at most {MAX_PIXELS:,} are read") from error
        # decoders raise many types for damaged files: SyntaxError, struct.error, IndexError, ...
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(path, f"cannot be read ({error.strerror})") from error
            raise InputError(path, f"the image is broken ({error or type(error).__name__})") from error


@functools.cache
def _register_heif() -> None:
    if HEIC_SUFFIXES:
        import pillow_heif

        pillow_heif.register_heif_opener()


@contextlib.contextmanager
def _without_pillow_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings about odd metadata and large sizes, which are harmless or refused here.

    Warning filters belong to the process. If two threads saved and restored them separately, they could stay changed.
    So the first thread that enters changes them, and the last that leaves restores them.
    """
    with _warnings_state.lock:
        if not _warnings_state.inside:
            _warnings_state.saved = warnings.catch_warnings()
            _warnings_state.saved.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _warnings_state.inside += 1
    try:
        yield
    finally:
        with _warnings_state.lock:
            _warnings_state.inside -= 1
            if not _warnings_state.inside and _warnings_state.saved is not None:
                _warnings_state.saved.__exit__(None, None, None)


def _read_npy(path: Path) -> NDArray[Any]:
    with reading(path):
        try:
            # mapped first, so that the size in the header is checked against the file before memory is allocated
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError, SyntaxError) as error:
            raise InputError(path, f"not a .npy file of numbers ({error})") from error


def to_rgb(image: Image.Image, path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Return an opened image as 8-bit RGB, see `read_image`. Use it with `decode`."""
    if image.mode.startswith("I;16"):
        # Pillow uses the upper byte of 16-bit colour; 16-bit grey is scaled in the same way
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in {"I", "F"}:
        kind = "signed or 32-bit integer" if image.mode == "I" else "32-bit float"
        raise InputError(path, f"has {kind} pixels of unknown range; save it with 8 or 16 bits")
    return np.array(flatten(image, _WHITE))


def _refuse_misread_tiff(image: Image.Image, path: Path) -> None:
    """Raise InputError for 16-bit TIFFs in separate planes or with white as zero.

    Pillow reads wrong pixels from them without an error.
    """
    tags = getattr(image, "tag_v2", {})
    if max(tags.get(_BITS_PER_SAMPLE, (1,))) <= 8:
        return
    if tags.get(_PHOTOMETRIC) == 0 or (tags.get(_PLANES) == 2 and tags.get(_SAMPLES_PER_PIXEL, 1) > 1):
        raise InputError(path, "a 16-bit TIFF in separate planes or with white as zero; save it as PNG")


def flatten(image: Image.Image, background: tuple[int, int, int, int]) -> Image.Image:
    """Return an image as RGB, with `background` behind its transparent parts."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA")).convert("RGB")
