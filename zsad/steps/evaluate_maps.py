"""Metrics of maps from any tool: a folder of maps and a folder of masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from medad.base.errors import CaseFailure, InputError
from zsad.config.run import EvaluationSettings
from zsad.data.images import MASK_SUFFIXES, decode, mask_to_canvas, read_map, resize_map, scaled_hw, to_mask
from zsad.data.label_folders import NORMAL_FOLDERS
from zsad.data.listing import files_below
from zsad.evaluation.metrics import ImageMetrics, PixelMetrics, image_metrics, pixel_metrics

MAP_SUFFIXES = (".npy", ".tif", ".tiff")


@dataclass(frozen=True)
class FolderEvaluation:
    """Metrics of a folder of maps."""

    image: ImageMetrics
    pixel: PixelMetrics
    problems: list[CaseFailure]
    """Maps and masks that were left out; their ids are paths without suffix."""


@dataclass(frozen=True)
class _Pair:
    map: Path
    mask: UInt8[np.ndarray, " bytes"]
    """Mask as packed bits, at evaluation size."""
    score: float
    anomalous: bool


def evaluate_folders(maps: Path, masks: Path, settings: EvaluationSettings) -> FolderEvaluation:
    """Compute the metrics of all maps of a folder. Maps are read one at a time, three times each.

    Maps and masks are paired by their paths relative to the folders, without suffix. A mask's name may end in `_mask`.
    An image is normal if its mask is black. It is also normal if it has no mask and its map is in a folder named good,
    normal or ok. Any other map without a mask is a problem, and so is a mask without a map: a typo in a name must not
    turn a defect into a normal image. The score of an image is the maximum of its map.

    A mask of another size is resized to the map by nearest neighbour. Both must have the same proportions, up to
    rounding, or the map must be square, for example from tools that squash their input. `settings.size_px` then scales
    the shorter side of both; None keeps the size of the map.

    Raises
    ------
    InputError
        A folder is missing, or no map can be used.
    """
    map_files = _files_by_stem(maps, MAP_SUFFIXES)
    mask_files = {stem.removesuffix("_mask"): path for stem, path in _files_by_stem(masks, MASK_SUFFIXES).items()}
    pairs: list[_Pair] = []
    problems: list[CaseFailure] = []
    for stem, path in map_files.items():
        try:
            pairs.append(_read_pair(path, Path(stem), mask_files.get(stem), settings))
        except InputError as error:
            problems.append(CaseFailure(stem, "find", error.rule, str(error.path)))
    problems += [
        CaseFailure(stem, "find", "no map of this name", str(mask_files[stem]))
        for stem in sorted(set(mask_files) - set(map_files))
    ]
    if not pairs:
        why = f"; the first of {len(problems)} problems: {problems[0].rule}" if problems else ""
        raise InputError(maps, f"no map to evaluate ({', '.join(MAP_SUFFIXES)}){why}")

    def source() -> Iterator[tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]]:
        for pair in pairs:
            scored = _at_size(read_map(pair.map), settings)
            yield scored, np.unpackbits(pair.mask, count=scored.size).view(bool).reshape(scored.shape)

    return FolderEvaluation(
        image=image_metrics(
            np.array([pair.score for pair in pairs]), np.array([pair.anomalous for pair in pairs], dtype=bool)
        ),
        pixel=pixel_metrics(source, max_fpr=settings.max_fpr, pro_200=settings.pro_200),
        problems=problems,
    )


def _files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(folder, "no such folder")
    found: dict[str, Path] = {}
    for relative in files_below(folder, suffixes):
        stem = relative.with_suffix("").as_posix()
        if stem in found:
            raise InputError(folder / relative, f"has the same name as {found[stem].name}, apart from the suffix")
        found[stem] = folder / relative
    return found


def _read_pair(path: Path, stem: Path, mask_path: Path | None, settings: EvaluationSettings) -> _Pair:
    """Read and check a map and its mask. Return the packed mask and the score."""
    raw = read_map(path)
    scored = _at_size(raw, settings)
    if mask_path is not None:
        mask = decode(mask_path, to_mask)
        if not _comparable(raw.shape, mask.shape):
            raise InputError(
                mask_path,
                f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its map {raw.shape[1]} x {raw.shape[0]}",
            )
    elif stem.parent.name.lower() in NORMAL_FOLDERS:
        mask = np.zeros(raw.shape, dtype=bool)
    else:
        raise InputError(path, "no mask of this name; a normal image needs a black mask, or its map in a folder good/")
    packed = np.packbits(mask_to_canvas(mask, scored.shape))
    return _Pair(path, packed, float(scored.max()), bool(mask.any()))


def _comparable(map_hw: tuple[int, ...], mask_hw: tuple[int, ...]) -> bool:
    """Return whether the map can be a resized version of the mask: same proportions up to a pixel, or a square map."""
    (h, w), (height, width) = map_hw, mask_hw
    return h == w or abs(h * width - w * height) <= max(height, width)


def _at_size(scored: Float[np.ndarray, "h w"], settings: EvaluationSettings) -> Float[np.ndarray, "H W"]:
    if settings.size_px is not None:
        height, width = scored.shape
        scored = resize_map(scored, scaled_hw(height, width, settings.size_px))
    if settings.smoothing_sigma_px > 0:
        scored = ndimage.gaussian_filter(scored, settings.smoothing_sigma_px)
    return scored
