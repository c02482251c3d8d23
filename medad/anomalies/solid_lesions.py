"""Pseudo lesions in three dimensions, in HU, on the stack of slices of a scan.

The segmentation network sees their sections, and the voxel classifier sees the whole lesions. Their sizes range from a
few millimetres to most of a lobe. They are darker than the liver, brighter, mixed, or have a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage
from scipy.special import erfc

from medad.config.anomalies import SolidLesionSettings

_MAX_CONTRAST_GROWTH = 0.5
"""Largest growth of a lesion's contrast from its edge to its centre, as a fraction."""
_RING_INNER = (0.55, 0.85)
"""Range of a ring's inner radius, as a fraction of the lesion's radius."""
_PATCH_SHARE = 0.3
"""Length over which patches and outline change, as a fraction of the lesion's radius."""
_BOX_SD = 12**-0.5
"""Standard deviation of a box of width one."""


@dataclass(frozen=True)
class SolidLesions:
    """Lesions of one copy of a scan.

    Attributes
    ----------
    shift_hu
        HU to add to the scan. It is 0 outside the organ.
    mask
        Voxels of the organ inside the lesions' outlines.
    """

    shift_hu: Float32[ndarray, "N S S"]
    mask: Bool[ndarray, "N S S"]


def draw_solid_lesions(
    organ: Bool[ndarray, "N S S"],
    spacing_mm: tuple[float, float, float],
    settings: SolidLesionSettings,
    rng: np.random.Generator,
) -> SolidLesions:
    """Draw 1 to `settings.most` lesions with their centres uniformly in the organ.

    A lesion is an ellipsoid of random orientation with an uneven outline. The added HU are its contrast times a profile
    with a soft edge. A plain lesion's contrast grows towards the centre. A mixed lesion has patches of a second
    contrast. A lesion with a ring has the second contrast in a shell. All lesions have a texture. Each plane averages
    over its thickness, as a scanner does.

    Parameters
    ----------
    organ
        Liver mask of consecutive planes. A lesion may be cut off by its surface or by the first or last plane.
    spacing_mm
        Pixel size along columns and rows, and the distance between planes.
    """
    shift = np.zeros(organ.shape, np.float32)
    mask = np.zeros(organ.shape, bool)
    inside = np.flatnonzero(organ)
    x_mm, y_mm, z_mm = spacing_mm
    spacing = np.array([z_mm, y_mm, x_mm])
    room = settings.largest_share * len(inside)
    for _ in range(int(rng.integers(1, settings.most + 1))):
        centre = np.array(np.unravel_index(int(rng.choice(inside)), organ.shape))
        radius_mm = _log_uniform(settings.diameter_mm, rng) / 2
        semi_mm = radius_mm * np.array([1.0, *rng.uniform(settings.shortest_axis, 1.0, 2)])
        edge_mm = _log_uniform(settings.edge_mm, rng)
        box, added, covered = _one_lesion(organ.shape, centre, semi_mm, edge_mm, spacing, settings, rng)
        covered &= organ[box]
        if np.count_nonzero(mask) + np.count_nonzero(covered) > room:
            continue
        shift[box] += added
        mask[box] |= covered
    shift = ndimage.gaussian_filter1d(shift, _BOX_SD, axis=0, mode="nearest", truncate=3)
    return SolidLesions(np.where(organ, shift, np.float32(0)), mask)


def _one_lesion(
    shape: tuple[int, ...],
    centre: ndarray,
    semi_mm: ndarray,
    edge_mm: float,
    spacing_mm: ndarray,
    settings: SolidLesionSettings,
    rng: np.random.Generator,
) -> tuple[tuple[slice, ...], Float32[ndarray, "z y x"], Bool[ndarray, "z y x"]]:
    """Return a box around a lesion, the HU to add in it, and the voxels inside the outline."""
    reach = semi_mm[0] * (1 + 2 * settings.unevenness) + 3 * edge_mm
    bounds = [
        (max(0, int(c) - ceil(reach / s)), min(n, int(c) + ceil(reach / s) + 1))
        for c, s, n in zip(centre, spacing_mm, shape, strict=True)
    ]
    axes = [((np.arange(*b) - c) * s).astype(np.float32) for b, c, s in zip(bounds, centre, spacing_mm, strict=True)]
    size = tuple(len(axis) for axis in axes)
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    offset = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) @ rotation.astype(np.float32)
    radius = np.sqrt(((offset / semi_mm.astype(np.float32)) ** 2).sum(-1))
    field = _smooth_noise(size, max(_PATCH_SHARE * semi_mm[0], 2.0), spacing_mm, rng)
    uneven = settings.unevenness * rng.uniform()
    distance = (radius - 1 - uneven * np.clip(field, -2, 2)) * np.float32(semi_mm.min())
    profile = erfc(distance / np.float32(np.sqrt(2) * edge_mm)) / 2
    added = profile * (_contrast(radius, field, settings, rng))
    texture = rng.uniform(*settings.texture_hu)
    if texture > 0:
        added += profile * texture * _smooth_noise(size, rng.uniform(2.0, 6.0), spacing_mm, rng)
    return tuple(slice(*b) for b in bounds), added.astype(np.float32), distance <= 0


def _contrast(
    radius: Float32[ndarray, "z y x"],
    field: Float32[ndarray, "z y x"],
    settings: SolidLesionSettings,
    rng: np.random.Generator,
) -> Float32[ndarray, "z y x"]:
    """Return the HU to add at each voxel, before the lesion's soft profile is applied."""
    main = _log_uniform(settings.contrast_hu, rng) * (1 if rng.uniform() < settings.bright_share else -1)
    second = _log_uniform(settings.contrast_hu, rng) * rng.choice((-1, 1))
    kind, growth = rng.uniform(), rng.uniform(0, _MAX_CONTRAST_GROWTH)
    contrast = main * (1 + growth * np.clip(1 - radius, 0, None))
    if kind < settings.mixed_share:
        share = 1 / (1 + np.exp(-4 * (field - rng.uniform(0.0, 0.8))))
        contrast += (second - main) * share
    elif kind < settings.mixed_share + settings.ring_share:
        inner = rng.uniform(*_RING_INNER)
        contrast += (second - main) / (1 + np.exp(-(radius - inner) / 0.05))
    return np.asarray(contrast, np.float32)


def _smooth_noise(
    size: tuple[int, ...], length_mm: float, spacing_mm: ndarray, rng: np.random.Generator
) -> Float32[ndarray, "z y x"]:
    """Draw noise of mean 0 and standard deviation 1 that is correlated over about `length_mm`."""
    # coarse noise, interpolated: blurring over a large lesion would take most of the time
    coarse = [max(2, ceil(n * s / length_mm) + 2) for n, s in zip(size, spacing_mm, strict=True)]
    noise = rng.standard_normal(coarse).astype(np.float32)
    places = [
        np.linspace(0.5, 0.5 + n * s / length_mm, n, dtype=np.float32) for n, s in zip(size, spacing_mm, strict=True)
    ]
    field = noise
    for axis, place in enumerate(places):
        field = interpolate_smoothly(field, np.minimum(place, field.shape[axis] - 1), axis)
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-6))


def interpolate_smoothly(values: ndarray, place: ndarray, axis: int) -> ndarray:
    """Interpolate along one axis with a smooth step between neighbours."""
    low = np.minimum(place.astype(int), values.shape[axis] - 2)
    part = (place - low).astype(np.float32)
    part = part * part * (3 - 2 * part)
    part = part.reshape([-1 if at == axis else 1 for at in range(values.ndim)])
    return np.asarray(np.take(values, low, axis) * (1 - part) + np.take(values, low + 1, axis) * part)


def _log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(log(bounds[0]), log(bounds[1]))))
