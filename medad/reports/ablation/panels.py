"""Pictures of an ablation: the same slices for each row (figures 3.4 and 3.5 of the thesis)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from PIL import Image
from safetensors.numpy import load_file

from medad.base.text import natural_order
from medad.reports import pictures
from medad.reports.run.document import read_tensor
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.steps.examples import EXAMPLES
from medad.steps.results import CaseResult, VariantResult

PANEL_PX = 168


@dataclass(frozen=True)
class PanelRow:
    """Picture of a slice for one row."""

    row: str
    """Name of the row."""
    picture: Image.Image


@dataclass(frozen=True)
class ShownSlice:
    """Pictures of one slice for all rows."""

    title: str
    rows: Sequence[PanelRow]


@dataclass(frozen=True)
class _TumourSlice:
    case_id: str
    z: int
    tumour_px: int


def test_panels(results: Sequence[VariantResult[Path]], count: int) -> list[ShownSlice]:
    """Return pictures of test slices with tumour, from the largest tumour to the smallest.

    They show the first seed of each row. Each has slice, restoration, difference, probability and outlines
    (`pictures.panel_row`).

    Parameters
    ----------
    results
        Rows in the order of the table.
    count
        Number of slices, evenly spaced in the order of tumour size over all cases.
    """
    first_seeds = [(one.name, one.seeds[min(one.seeds)]) for one in results if one.seeds]
    if not first_seeds or not count:
        return []
    shown = []
    for place in _evenly_spaced(_tumour_slices(first_seeds[-1][1]), count):
        rows = []
        for name, cases in first_seeds:
            case = next((one for one in cases if one.case_id == place.case_id), None)
            picture = None if case is None else _slice_picture(case, place.z)
            if picture is not None:
                rows.append(PanelRow(name, picture))
        shown.append(ShownSlice(f"{place.case_id}, z = {place.z}: {place.tumour_px:,} tumour pixels", rows))
    return shown


def example_panels(results: Sequence[VariantResult[Path]], count: int) -> list[PanelRow]:
    """Return for each row its synthesised slices as a column: clean, synthesised, mask, restored, difference."""
    found = []
    for result in results:
        if result.examples is None:
            continue
        arrays = load_file(result.examples / EXAMPLES)
        strips = [_example_picture({name: array[number] for name, array in arrays.items()}) for number in range(count)
                  if number < len(arrays["clean"])]  # fmt: skip
        if strips:
            found.append(PanelRow(result.name, _stack(strips)))
    return found


def _tumour_slices(cases: Sequence[CaseResult[Path]]) -> list[_TumourSlice]:
    places = []
    for case in cases:
        if case.segmented is None or case.evaluated is None:
            continue
        area = read_tensor(case.evaluated / "truth.safetensors", "tumour").sum(axis=(1, 2), dtype=np.int64)
        z = read_tensor(case.segmented / "slices.safetensors", "z")
        places += [_TumourSlice(case.case_id, int(z[i]), int(area[i])) for i in np.flatnonzero(area)]
    return sorted(places, key=lambda one: (-one.tumour_px, natural_order(one.case_id), one.z))


def _evenly_spaced(places: Sequence[_TumourSlice], count: int) -> list[_TumourSlice]:
    chosen = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int))
    return [places[i] for i in chosen] if places else []


def _slice_picture(case: CaseResult[Path], z: int) -> Image.Image | None:
    if case.segmented is None or case.evaluated is None:
        return None
    path = case.segmented / "slices.safetensors"
    places = np.flatnonzero(read_tensor(path, "z") == z)
    if not len(places):
        return None
    i = int(places[0])
    prepared = load_prepared(case.prepared / PREPARED)
    grid = prepared.slices.grid
    organ = read_tensor(path, "organ", i).astype(bool)
    view = pictures.SliceView(
        pixels=read_tensor(path, "pixels", i),
        restored=read_tensor(path, "restored", i),
        organ=organ,
        probability=read_tensor(path, "probability", i),
        prediction=read_tensor(path, "mask", i).astype(bool),
        truth=read_tensor(case.evaluated / "truth.safetensors", "tumour", i).astype(bool),
    )
    crop = pictures.crop_around(organ, min_side=grid.size_px // 4)
    px_mm = prepared.geometry.canonical_spacing_mm[0] * grid.shape_xy[0] / grid.size_px
    return pictures.panel_row(view, crop, PANEL_PX, px_mm=px_mm)


def _example_picture(arrays: dict[str, ndarray]) -> Image.Image:
    organ: Bool[ndarray, "S S"] = arrays["organ"].astype(bool)
    crop = pictures.crop_around(organ, min_side=len(organ) // 4)
    restored = np.where(organ, arrays["restored"], 0).astype(np.uint8)
    return pictures.grey_row(
        [
            arrays["clean"],
            arrays["spoilt"],
            (arrays["mask"] * 255).astype(np.uint8),
            restored,
            pictures.difference_picture(arrays["clean"], restored, organ),
        ],
        crop,
        PANEL_PX,
    )


def _stack(strips: Sequence[Image.Image]) -> Image.Image:
    gap = 4
    height = sum(strip.height for strip in strips) + gap * (len(strips) - 1)
    picture = Image.new("RGB", (strips[0].width, height), (128, 128, 128))
    for number, strip in enumerate(strips):
        picture.paste(strip, (0, number * (strip.height + gap)))
    return picture
