"""Augmentation of healthy livers in three dimensions: other scanners, contrast phases, vessels and fissures.

All changes count as healthy. They are the changes of `medad.anomalies.augment`, on a stack of planes.
"""

from __future__ import annotations

from math import ceil, log

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy import ndimage

from medad.anomalies.solid_lesions import interpolate_smoothly
from medad.classifier.features import LiverStack
from medad.config.anomalies import AugmentationSettings
from medad.config.training import ClassifierSettings

_STEP_MM = 3.0
"""Distance between two points of a vessel."""
_TURN = 0.35
"""Standard deviation of a vessel's change of direction at each point."""
_BRANCH = 0.1
"""Chance of a branch at each point of a vessel."""
_TRUNKS = (8, 24)
_LENGTH_MM = (30.0, 140.0)
_EDGE_MM = 1.0
"""Width of a vessel's soft edge."""
_TREE_POINTS = 400
"""Largest number of points of a tree."""
_SHEETS, _SHEET_MM, _SHEET_RADIUS_MM = (1, 4), (1.5, 5.0), (12.0, 40.0)
"""Number of sheets of fat (from, below), their thickness and their radius."""
_SHEET_WAVE_MM, _SHEET_BEND_MM = 40.0, 4.0
"""Length and standard deviation of a sheet's bends."""
_STRANDS, _STRAND_MM, _STRAND_SHARE = (1, 5), (2.0, 9.0), 0.5
"""Number and diameter of strands of fat, and share of copies with fat that have strands."""


def augment_stack(
    liver: LiverStack, augmentation: AugmentationSettings, settings: ClassifierSettings, rng: np.random.Generator
) -> Float32[ndarray, "P S S"]:
    """Return HU with another contrast, a slow inhomogeneity, a shade, vessels, fissures and another rim."""
    hu, organ = liver.hu, liver.organ
    spacing = np.array(liver.spacing_mm)
    extent = np.array(hu.shape) * spacing
    middle = float(np.median(hu[organ]))
    varied = (hu - middle) * np.exp(rng.uniform(-augmentation.gain_log, augmentation.gain_log)) + middle
    varied += wave(hu.shape, spacing, extent.max() * rng.uniform(0.15, 0.5), rng) * rng.uniform(
        0, augmentation.field_hu
    )
    if augmentation.shade_hu != (0, 0):
        varied += _shade(organ, spacing, augmentation, rng)
    if rng.uniform() < settings.vessel_share:
        # most scans show vessels brighter than the liver; without contrast agent they are darker
        contrast = np.exp(rng.uniform(log(settings.vessel_hu[0]), log(settings.vessel_hu[1])))
        contrast *= 1 if rng.uniform() < 0.8 else -0.3
        varied += contrast * vessel_tree(organ, spacing, augmentation.vessel_mm, rng)
    if rng.uniform() < settings.fissure_share:
        varied += fissures(organ, spacing, rng) * (rng.uniform(*settings.fissure_hu) - varied)
    if augmentation.rim_px > 0:
        near = np.clip(1 - liver.depth_mm / np.float32(augmentation.rim_px * spacing[1]), 0, 1)
        uneven = 1 / (1 + np.exp(-2 * wave(hu.shape, spacing, 20.0, rng)))
        varied += rng.uniform(*augmentation.rim_hu) * near * uneven
    return np.where(organ, varied, hu).astype(np.float32)


def add_stack_noise(
    hu: Float32[ndarray, "P S S"],
    organ: Bool[ndarray, "P S S"],
    limits_hu: tuple[float, float],
    rng: np.random.Generator,
) -> Float32[ndarray, "P S S"]:
    """Return HU with noise of random strength and grain."""
    noise = rng.standard_normal(hu.shape, np.float32)
    grain = rng.uniform(0.0, 1.0)
    noise = ndimage.gaussian_filter(noise, (grain / 2, grain, grain), truncate=2)
    return np.where(organ, hu + noise * np.float32(rng.uniform(*limits_hu) / noise.std()), hu)


def wave(
    shape: tuple[int, ...], spacing_mm: ndarray, length_mm: float, rng: np.random.Generator
) -> Float32[ndarray, "P S S"]:
    """Draw a smooth field of mean 0 and standard deviation 1 that changes over about `length_mm`."""
    coarse = [max(2, ceil(n * s / length_mm) + 1) for n, s in zip(shape, spacing_mm, strict=True)]
    field = rng.standard_normal(coarse).astype(np.float32)
    for axis, n in enumerate(shape):
        place = np.linspace(0, field.shape[axis] - 1, n, dtype=np.float32)
        field = interpolate_smoothly(field, place, axis)
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-6))


def _shade(
    organ: Bool[ndarray, "P S S"], spacing: ndarray, augmentation: AugmentationSettings, rng: np.random.Generator
) -> Float32[ndarray, "P S S"]:
    """Draw a shade: one side of a wavy plane through the organ differs from the other, with a gradual change."""
    inside = np.flatnonzero(organ)
    centre = np.array(np.unravel_index(int(rng.choice(inside)), organ.shape))
    normal = rng.standard_normal(3)
    normal /= np.linalg.norm(normal)
    low, high = augmentation.shade_mm
    width = float(np.exp(rng.uniform(log(low), log(high))))
    axes = [
        ((np.arange(n) - c) * s * u).astype(np.float32)
        for n, c, s, u in zip(organ.shape, centre, spacing, normal, strict=True)
    ]
    across = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :]
    across = across + wave(organ.shape, spacing, 40.0, rng) * np.float32(width / 4)
    shade: ndarray = rng.uniform(*augmentation.shade_hu) / (1 + np.exp(-np.clip(4 * across / width, -30, 30)))
    return shade


def fissures(organ: Bool[ndarray, "P S S"], spacing: ndarray, rng: np.random.Generator) -> Float32[ndarray, "P S S"]:
    """Draw thin bent sheets, and often strands, of fat in the organ: share of fat, 0..1, with a soft edge."""
    painted = np.zeros(organ.shape, np.float32)
    inside = np.flatnonzero(organ)
    for _ in range(int(rng.integers(*_SHEETS))):
        centre = np.array(np.unravel_index(int(rng.choice(inside)), organ.shape))
        axes = [
            ((np.arange(n) - c) * s).astype(np.float32) for n, c, s in zip(organ.shape, centre, spacing, strict=True)
        ]
        z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
        normal = _direction(rng).astype(np.float32)
        across = z * normal[0] + y * normal[1] + x * normal[2]
        across = across + wave(organ.shape, spacing, _SHEET_WAVE_MM, rng) * np.float32(_SHEET_BEND_MM)
        half_mm = np.exp(rng.uniform(*np.log(_SHEET_MM))) / 2
        sheet = np.clip((half_mm + _EDGE_MM - np.abs(across)) / (2 * _EDGE_MM), 0, 1)
        near = z * z + y * y + x * x < rng.uniform(*_SHEET_RADIUS_MM) ** 2
        np.maximum(painted, np.where(near, sheet, 0), out=painted, casting="same_kind")
    if rng.uniform() < _STRAND_SHARE:
        painted = np.maximum(painted, vessel_tree(organ, spacing, _STRAND_MM, rng, trunks=_STRANDS))
    return np.where(organ, painted, np.float32(0))


def vessel_tree(
    organ: Bool[ndarray, "P S S"],
    spacing: ndarray,
    diameter_mm: tuple[float, float],
    rng: np.random.Generator,
    *,
    trunks: tuple[int, int] = _TRUNKS,
) -> Float32[ndarray, "P S S"]:
    """Draw trees of curved, thinning vessels: 1 inside, 0 outside, with a soft edge."""
    painted = np.zeros(organ.shape, np.float32)
    inside = np.flatnonzero(organ)
    extent = np.array(organ.shape) * spacing
    low, high = diameter_mm
    for _ in range(int(rng.integers(*trunks))):
        start = np.array(np.unravel_index(int(rng.choice(inside)), organ.shape)) * spacing
        radius = np.exp(rng.uniform(log(low), log(high))) / 2
        growing = [(start, _direction(rng), radius, rng.uniform(*_LENGTH_MM))]
        points = 0
        while growing and points < _TREE_POINTS:
            place, heading, radius, left = growing.pop()
            thinning = (low / 2 / radius) ** (_STEP_MM / max(left, _STEP_MM)) if radius > low / 2 else 1.0
            while left > 0 and (place >= 0).all() and (place < extent).all() and points < _TREE_POINTS:
                _stamp(painted, place, radius, spacing)
                heading = heading + rng.standard_normal(3) * _TURN
                heading /= np.linalg.norm(heading)
                place, radius, left, points = place + heading * _STEP_MM, radius * thinning, left - _STEP_MM, points + 1
                if rng.uniform() < _BRANCH:
                    growing.append((place, _direction(rng), 0.8 * radius, 0.7 * left))
    return np.where(organ, painted, np.float32(0))


def _direction(rng: np.random.Generator) -> ndarray:
    heading = rng.standard_normal(3)
    return np.asarray(heading / np.linalg.norm(heading))


def _stamp(painted: ndarray, place_mm: ndarray, radius_mm: float, spacing: ndarray) -> None:
    """Paint a soft ball."""
    reach = radius_mm + _EDGE_MM
    bounds = [
        (max(0, ceil((p - reach) / s)), min(n, int((p + reach) / s) + 1))
        for p, s, n in zip(place_mm, spacing, painted.shape, strict=True)
    ]
    if any(a >= b for a, b in bounds):
        return
    squares = [(np.arange(*b) * s - p) ** 2 for b, s, p in zip(bounds, spacing, place_mm, strict=True)]
    distance = np.sqrt(squares[0][:, None, None] + squares[1][None, :, None] + squares[2])
    ball = np.clip((radius_mm + _EDGE_MM - distance) / (2 * _EDGE_MM), 0, 1).astype(np.float32)
    box = tuple(slice(*b) for b in bounds)
    np.maximum(painted[box], ball, out=painted[box])
