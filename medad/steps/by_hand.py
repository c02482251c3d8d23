"""Single preprocessing steps from file to file, to run by hand: window, roi, slice, equalise.

In this order they give the same slices as `prepare`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from medad.base.errors import InputError
from medad.config.header import HeaderSettings
from medad.config.liver import PreprocessSettings
from medad.ct.checks import require_liver
from medad.ct.io import Geometry, read_labels, read_labels_on, read_scan, write_grey
from medad.slices.grid import Slices, slice_grid, slice_volume
from medad.slices.prepared_file import load_prepared, save_prepared
from medad.slices.preprocess import equalise, liver_roi, window

WINDOWED, ROI = "window.nii.gz", "roi.nii.gz"
SLICES, EQUALISED = "slices.safetensors", "equalised.safetensors"
"""File of each step. The names differ, so that one folder can have the results of all steps."""


def _read_grey(source: Path, header: HeaderSettings) -> tuple[ndarray, Geometry]:
    labels = read_labels(source, affine_from=header.affine_from, spacing_mm=header.spacing_mm)
    if labels.values.dtype != np.uint8:
        raise InputError(source, "expected a grey image 0..255, as written by the window step")
    return labels.values, labels.geometry


def _read_liver(
    geometry: Geometry, liver: Path | None, liver_labels: tuple[int, ...], header: HeaderSettings
) -> Bool[ndarray, "X Y Z"]:
    if liver is None:
        raise InputError("--liver", "this step needs a liver mask on the image's grid")
    labels, _ = read_labels_on(geometry, liver, **header.model_dump(), liver_labels=liver_labels)
    return require_liver(labels, liver_labels, liver)


def step_window(
    source: Path,
    liver: Path | None,
    liver_labels: tuple[int, ...],
    settings: PreprocessSettings,
    header: HeaderSettings,
    out: Path,
) -> None:
    """Write window.nii.gz from a CT: `window_hu` mapped to 0..255, on the scan's grid. The liver is not used."""
    del liver, liver_labels
    volume = read_scan(source, affine_from=header.affine_from, spacing_mm=header.spacing_mm)
    write_grey(out / WINDOWED, window(volume.hu, settings.window_hu), volume.geometry)


def step_roi(
    source: Path,
    liver: Path | None,
    liver_labels: tuple[int, ...],
    settings: PreprocessSettings,
    header: HeaderSettings,
    out: Path,
) -> None:
    """Write roi.nii.gz from a grey image, with zero outside the liver."""
    del settings
    grey, geometry = _read_grey(source, header)
    write_grey(out / ROI, liver_roi(grey, _read_liver(geometry, liver, liver_labels, header)), geometry)


def step_slice(
    source: Path,
    liver: Path | None,
    liver_labels: tuple[int, ...],
    settings: PreprocessSettings,
    header: HeaderSettings,
    out: Path,
) -> None:
    """Write slices.safetensors from a grey image: the slices that contain liver, resized."""
    grey, geometry = _read_grey(source, header)
    mask = _read_liver(geometry, liver, liver_labels, header)
    grid = slice_grid(mask, geometry.canonical_spacing_mm, settings)
    slices = slice_volume(grey, mask, grid, settings.min_liver_px)
    save_prepared(out / SLICES, slices, geometry, mask)


def step_equalise(
    source: Path,
    liver: Path | None,
    liver_labels: tuple[int, ...],
    settings: PreprocessSettings,
    header: HeaderSettings,
    out: Path,
) -> None:
    """Write equalised.safetensors with the histogram of each slice equalised over its liver pixels."""
    del liver, liver_labels, header
    prepared = load_prepared(source, with_liver=True)
    assert prepared.liver is not None
    old = prepared.slices
    pixels = equalise(old.pixels, old.organ, settings.lift_dark)
    save_prepared(out / EQUALISED, Slices(pixels, old.organ, old.z, old.grid), prepared.geometry, prepared.liver)
