"""Metrics of maps from any tool: a folder of maps and a folder of masks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from medad.base.errors import CaseFailure, InputError
from medad.base.text import list_names
from zsad.config.run import EvaluationSettings
from zsad.data.images import MASK_SUFFIXES, mask_to_canvas, read_map, resize_map, scaled_hw
from zsad.data.listing import LeftOut, files_below
from zsad.data.masks import INVERTED_ABOVE, check_mask, load_mask
from zsad.data.photographs import NORMAL_FOLDERS
from zsad.evaluation.metrics import ImageMetrics, PixelMetrics, image_metrics, pixel_metrics

MAP_SUFFIXES = (".npy", ".tif", ".tiff")


@dataclass(frozen=True)
class FolderEvaluation:
    """Metrics of a folder of maps."""

    image: ImageMetrics
    pixel: PixelMetrics
    problems: list[CaseFailure]
    """Maps and masks that were left out; their ids are paths without suffix."""
    notes: tuple[str, ...] = ()
    """Sentences on masks that were used but may be inverted."""


@dataclass(frozen=True)
class _Pair:
    map: Path
    mask: UInt8[np.ndarray, " bytes"]
    """Mask as packed bits, at evaluation size."""
    score: float
    anomalous_share: float
    """Share of anomalous pixels. 0: the image is normal."""


def evaluate_folders(maps: Path, masks: Path, settings: EvaluationSettings) -> FolderEvaluation:
    """Compute the metrics of all maps of a folder. Maps are read one at a time, three times each.

    Maps and masks are paired by their paths relative to the folders, without suffix. A mask's name may end in `_mask`.
    Instead of a mask there may be a folder of this name, whose masks are joined (MVTec LOCO).
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
    left_out = LeftOut()
    map_files = _files_by_stem(maps, MAP_SUFFIXES, left_out)
    mask_files, problems = _masks_by_stem(masks, map_files)
    known = {problem.case_id for problem in problems}
    pairs: list[_Pair] = []
    for stem, path in map_files.items():
        try:
            if stem not in known:
                pairs.append(_read_pair(path, Path(stem), mask_files.get(stem), settings))
        except InputError as error:
            problems.append(CaseFailure(stem, "find", error.rule, str(error.path), "the maps"))
    unused = sorted(set(mask_files) - set(map_files))
    problems += [
        CaseFailure(stem, "find", "no map of this name", str(mask_files[stem]), "the masks") for stem in unused
    ]
    if not pairs:
        raise InputError(maps, _why_no_pair(map_files, mask_files, unused, problems, left_out))

    def source() -> Iterator[tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]]:
        for pair in pairs:
            scored = _at_size(read_map(pair.map), settings)
            yield scored, np.unpackbits(pair.mask, count=scored.size).view(bool).reshape(scored.shape)

    return FolderEvaluation(
        image=image_metrics(
            np.array([pair.score for pair in pairs]), np.array([pair.anomalous_share > 0 for pair in pairs], dtype=bool)
        ),
        pixel=pixel_metrics(source, max_fpr=settings.max_fpr, pro_200=settings.pro_200),
        problems=problems,
        notes=_notes(pairs),
    )


def _notes(pairs: Sequence[_Pair]) -> tuple[str, ...]:
    """Return a sentence on the masks that may be inverted, or nothing."""
    names = [pair.map.stem for pair in pairs if pair.anomalous_share > INVERTED_ABOVE]
    text = f"More than half of the image is anomalous in the mask, which may be inverted: {list_names(names)}."
    return (text,) * bool(names)


def _masks_by_stem(masks: Path, maps: Collection[str]) -> tuple[dict[str, Path], list[CaseFailure]]:
    """Return the mask of each name, a file or a folder of masks, and the problems of names with two masks.

    A name ends without `_mask`, unless a map has the name with it.
    """
    named: dict[str, dict[Path, None]] = {}
    for relative in files_below(masks, MASK_SUFFIXES) if masks.is_dir() else ():
        stem, folder = relative.with_suffix("").as_posix(), relative.parent.as_posix()
        bare = stem if stem in maps else stem.removesuffix("_mask")
        in_folder = folder in maps and bare not in maps
        path = masks / (relative.parent if in_folder else relative)
        named.setdefault(folder if in_folder else bare, {})[path] = None
    if not masks.is_dir():
        raise InputError(masks, "no such folder")
    problems = []
    for stem, paths in named.items():
        if len(paths) > 1:
            names = " and ".join(sorted(path.name for path in paths))
            rule, first = f"two masks of one name: {names}", str(next(iter(paths)))
            problems.append(CaseFailure(stem, "find", rule, first, "the masks"))
    return {stem: next(iter(paths)) for stem, paths in named.items()}, problems


def _why_no_pair(
    maps: Mapping[str, Path],
    masks: Mapping[str, Path],
    unused: Sequence[str],
    problems: Sequence[CaseFailure],
    left_out: LeftOut,
) -> str:
    """Return why no map can be evaluated, in one line."""
    why = f"no map to evaluate ({', '.join(MAP_SUFFIXES)})"
    if not maps:
        return why + (f". {left_out.sentence}".rstrip(".") if left_out.sentence else "")
    if len(unused) == len(masks) > 0:
        map_name, mask_name = next(iter(maps.values())).name, masks[unused[0]].name
        return f"{why}: no mask has the name of a map; a map is {map_name}, a mask {mask_name}"
    return f"{why}; the first of {len(problems)} problems: {problems[0].rule}"


def _files_by_stem(folder: Path, suffixes: tuple[str, ...], left_out: LeftOut) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(folder, "no such folder")
    found: dict[str, Path] = {}
    for relative in files_below(folder, suffixes, left_out):
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
        mask = load_mask(mask_path)
        if mask.any():
            check_mask(mask, mask_path)
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
    return _Pair(path, packed, float(scored.max()), float(mask.mean()))


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
