"""Defects. Each function takes an image f32[S,S,3] with values 0..1 and the region in which the defect may lie.

It returns the image with the defect.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32
from numpy.random import Generator
from scipy.ndimage import gaussian_filter, map_coordinates

from zsad.embedded.scenes.fields import band_noise, blob, fractal_noise, line_through, random_pixel, stroke

Picture = Float32[np.ndarray, "S S 3"]
Region = Bool[np.ndarray, "S S"]
Defect = Callable[[Generator, Picture, Region], Picture]


def _mix(image: Picture, other: np.ndarray, weight: np.ndarray) -> Picture:
    weight = weight[..., None]
    return np.asarray(image * (1 - weight) + other * weight, np.float32)


def _contrasting(rng: Generator, image: Picture, region: Region) -> np.ndarray:
    """Return a colour that differs from the region's mean."""
    mean = image[region].mean(0)
    grey = rng.uniform(-1, 1)
    wanted = mean + np.sign(0.5 - mean.mean() + 0.3 * grey) * rng.uniform(0.3, 0.7)
    return np.asarray(np.clip(wanted + rng.uniform(-0.2, 0.2, 3) * (rng.random() < 0.6), 0, 1))


def _scratch(rng: Generator, image: Picture, region: Region) -> Picture:
    line = stroke(rng, region, length=(0.15, 0.6), width_px=(1.0, 3.5), bend=0.03)
    return _mix(image, _contrasting(rng, image, region), line * rng.uniform(0.6, 1))


def _crack(rng: Generator, image: Picture, region: Region) -> Picture:
    line = stroke(rng, region, length=(0.2, 0.6), width_px=(1.0, 3.0), bend=0.45)
    for _ in range(int(rng.integers(0, 3))):
        near = region & (gaussian_filter(line, 4) > 0.02)
        if near.any():
            line = np.maximum(
                line,
                stroke(
                    rng,
                    near | (region & (gaussian_filter(line, 14) > 0.002)),
                    length=(0.1, 0.3),
                    width_px=(1.0, 2.0),
                    bend=0.5,
                ),
            )
    return _mix(image, image * rng.uniform(0.05, 0.35), line)


def _stain(rng: Generator, image: Picture, region: Region) -> Picture:
    tint = _contrasting(rng, image, region)
    return _mix(
        image,
        tint * image.mean(-1, keepdims=True) * 0.6 + tint * 0.4,
        blob(rng, region, (0.05, 0.2)) * rng.uniform(0.5, 0.95),
    )


def _hole(rng: Generator, image: Picture, region: Region) -> Picture:
    shape = blob(rng, region, (0.03, 0.1))
    rim = np.clip(gaussian_filter(shape, 2) * 1.5 - shape, 0, 1)
    dark = rng.uniform(0, 0.12) if image[region].mean() > 0.25 else rng.uniform(0.6, 1.0)
    return np.asarray(np.clip(_mix(image, np.full(3, dark), shape) + 0.3 * rim[..., None], 0, 1), np.float32)


def _contamination(rng: Generator, image: Picture, region: Region) -> Picture:
    sigma = rng.uniform(0.7, 3)
    foreign = band_noise(rng, image.shape[0], (sigma, sigma))[..., None] * _contrasting(rng, image, region) * 1.4
    return _mix(image, np.clip(foreign, 0, 1), blob(rng, region, (0.05, 0.18)))


def _spots(rng: Generator, image: Picture, region: Region) -> Picture:
    colour = _contrasting(rng, image, region)
    weight = np.zeros(region.shape, np.float32)
    for _ in range(int(rng.integers(3, 9))):
        weight = np.maximum(weight, blob(rng, region, (0.012, 0.035)))
    return _mix(image, colour, weight)


def _fibre(rng: Generator, image: Picture, region: Region) -> Picture:
    line = stroke(rng, region, length=(0.3, 0.9), width_px=(1.2, 3.0), bend=0.16)
    return _mix(image, rng.uniform(0, 1, 3) if rng.random() < 0.5 else _contrasting(rng, image, region), line)


def _smear(rng: Generator, image: Picture, region: Region) -> Picture:
    sigma = rng.uniform(3, 7)
    sigmas = (sigma, sigma, 0) if rng.random() < 0.5 else (sigma * 2.0, 0.3, 0)
    shift = rng.uniform(-0.12, 0.12)
    return _mix(image, gaussian_filter(image, sigmas) + shift, blob(rng, region, (0.08, 0.22)))


def _transplant(rng: Generator, image: Picture, region: Region) -> Picture:
    turned = np.rot90(image, int(rng.integers(1, 4)))
    moved = np.roll(turned, tuple(rng.integers(10, image.shape[0] - 10, 2)), (0, 1))
    return _mix(image, np.clip(moved + rng.uniform(-0.1, 0.1), 0, 1), blob(rng, region, (0.07, 0.2)) > 0.5)


def _fade(rng: Generator, image: Picture, region: Region) -> Picture:
    factor = rng.choice([rng.uniform(0.3, 0.65), rng.uniform(1.4, 1.9)])
    return _mix(image, np.clip(image * factor, 0, 1), gaussian_filter(blob(rng, region, (0.08, 0.22)), 3))


def _missing(rng: Generator, image: Picture, region: Region) -> Picture:
    outside = image[~region]
    fill = (
        outside.mean(0) if len(outside) > 50 else np.full(3, rng.choice([rng.uniform(0, 0.15), rng.uniform(0.85, 1)]))
    )
    return _mix(image, fill, blob(rng, region, (0.08, 0.2)) > 0.4)


def _rough(rng: Generator, image: Picture, region: Region) -> Picture:
    noise = rng.normal(0, rng.uniform(0.15, 0.35), (*region.shape, 1))
    return _mix(image, np.clip(image + noise, 0, 1), blob(rng, region, (0.07, 0.2)))


def _edge(rng: Generator, region: Region) -> tuple[float, float]:
    """Return a random pixel (y, x) of the region's edge, or of the region if it has no edge."""
    edge = region & (gaussian_filter(region.astype(np.float32), 2, mode="nearest") < 0.8)
    return random_pixel(rng, edge if edge.any() else region)


def _ground(rng: Generator, image: Picture, region: Region) -> np.ndarray:
    """Return the mean colour outside the region, or a dark colour if the region is the whole image."""
    outside = image[~region]
    return np.asarray(outside.mean(0) if len(outside) > 50 else np.full(3, rng.uniform(0, 0.15)))


def _cut(rng: Generator, image: Picture, region: Region) -> Picture:
    """Cut off a corner or side along a straight line."""
    cy, cx = _edge(rng, region)
    y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[0]]
    middle_y, middle_x = (float(axis[region].mean()) for axis in (y, x))
    angle = np.arctan2(cy - middle_y, cx - middle_x) + rng.uniform(-0.7, 0.7)
    beyond = (y - cy) * np.sin(angle) + (x - cx) * np.cos(angle) + image.shape[0] * rng.uniform(0.03, 0.12)
    near = np.hypot(y - cy, x - cx) < image.shape[0] * 0.3
    return _mix(image, _ground(rng, image, region), np.clip(beyond + 0.5, 0, 1) * (region & near))


def _dent(rng: Generator, image: Picture, region: Region) -> Picture:
    """Push the surroundings of a pixel of the edge inwards."""
    size_px = image.shape[0]
    cy, cx = _edge(rng, region)
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32)
    reach = size_px * rng.uniform(0.04, 0.1)
    angle = np.arctan2(cy - y[region].mean(), cx - x[region].mean()) + rng.uniform(-0.5, 0.5)
    push = reach * rng.uniform(0.8, 1.4) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * reach**2))
    at = [y + push * np.sin(angle), x + push * np.cos(angle)]
    pushed = np.stack([map_coordinates(image[..., c], at, order=1, mode="nearest") for c in range(3)], -1)
    return _mix(image, pushed * rng.uniform(0.7, 1.0), region * np.clip(push / 2, 0, 1))


def _burr(rng: Generator, image: Picture, region: Region) -> Picture:
    """Add material outside the edge, or a lump on a surface."""
    around = gaussian_filter(region.astype(np.float32), 0.035 * image.shape[0]) > 0.1
    lump = blob(rng, around & ~region if (around & ~region).any() else region, (0.04, 0.12))
    colour = image[region].mean(0) * rng.uniform(0.8, 1.2)
    return _mix(image, np.clip(colour + rng.uniform(-0.25, 0.25) * region.all(), 0, 1), lump)


def _bite(rng: Generator, image: Picture, region: Region) -> Picture:
    """Break off a piece at the edge, or at the image's border on a surface."""
    size_px = image.shape[0]
    edge = region & (gaussian_filter(region.astype(np.float32), 2, mode="constant") < 0.8)
    cy, cx = random_pixel(rng, edge if edge.any() else region)
    y, x = np.mgrid[0:size_px, 0:size_px]
    radius = size_px * rng.uniform(0.07, 0.16)
    missing = np.hypot(y - cy, x - cx) + 6 * (fractal_noise(rng, size_px, 0.5) - 0.5) < radius
    outside = image[~region]
    fill = outside.mean(0) if len(outside) > 50 else np.full(3, rng.uniform(0, 0.1))
    return _mix(image, fill, (missing & region).astype(np.float32))


def _fold(rng: Generator, image: Picture, region: Region) -> Picture:
    """Twist the surface around a point and add the shade of a fold."""
    size_px = image.shape[0]
    cy, cx = random_pixel(rng, region)
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32)
    radius = size_px * rng.uniform(0.1, 0.2)
    distance = np.hypot(y - cy, x - cx)
    near = np.clip(1 - distance / radius, 0, 1)
    twist = rng.choice([-1, 1]) * rng.uniform(1.2, 2.5) * near
    source_y = cy + (y - cy) * np.cos(twist) - (x - cx) * np.sin(twist)
    source_x = cx + (y - cy) * np.sin(twist) + (x - cx) * np.cos(twist)
    warped = np.stack(
        [map_coordinates(image[..., c], [source_y, source_x], order=1, mode="nearest") for c in range(3)], -1
    )
    shade = rng.choice([-1, 1]) * rng.uniform(0.15, 0.35) * near * np.cos(distance / radius * 6)
    inside = (near > 0) & region
    return np.asarray(np.where(inside[..., None], np.clip(warped + shade[..., None], 0, 1), image), np.float32)


def _glue(rng: Generator, image: Picture, region: Region) -> Picture:
    """Add a translucent drop that blurs and tints the image, with a bright rim and a highlight."""
    drop = blob(rng, region, (0.06, 0.16))
    below = gaussian_filter(image, (2.5, 2.5, 0)) * rng.uniform(0.55, 0.8) + rng.uniform(0.15, 0.35)
    rim = np.clip(1.6 * gaussian_filter(drop, 1.5) * (1 - gaussian_filter(drop, 1.5)) * 2, 0, 1) * drop
    shine = np.roll(np.clip(gaussian_filter(drop, 4) * 3 - 2.2, 0, 1), (-3, -3), (0, 1)) * drop
    return np.asarray(np.clip(_mix(image, below, drop * 0.9) + (0.35 * rim + 0.4 * shine)[..., None], 0, 1), np.float32)


def _gouges(rng: Generator, image: Picture, region: Region) -> Picture:
    """Add several parallel grooves, each with a dark and a bright side."""
    size_px = image.shape[0]
    cy, cx = random_pixel(rng, region)
    angle, length = rng.uniform(0, np.pi), size_px * rng.uniform(0.1, 0.25)
    out = image
    for k in range(int(rng.integers(3, 7))):
        along = np.linspace(-length / 2, length / 2, int(length) + 2)
        off = (k - 2) * rng.uniform(4, 7)
        ys = cy + along * np.sin(angle) + off * np.cos(angle)
        xs = cx + along * np.cos(angle) - off * np.sin(angle)
        groove = line_through(ys, xs, 2.0, size_px) * region
        lip = line_through(ys + 1.6, xs + 1.6, 1.2, size_px) * region
        out = _mix(_mix(out, np.full(3, 0.9), lip * 0.6), np.full(3, 0.08), groove * 0.85)
    return out


DEFECTS: dict[str, Defect] = {
    "scratch": _scratch,
    "crack": _crack,
    "stain": _stain,
    "hole": _hole,
    "contamination": _contamination,
    "spots": _spots,
    "fibre": _fibre,
    "smear": _smear,
    "transplant": _transplant,
    "fade": _fade,
    "missing part": _missing,
    "rough patch": _rough,
}
EDGE_DEFECTS: dict[str, Defect] = {"cut": _cut, "dent": _dent, "burr": _burr}
HELD_OUT_DEFECTS: dict[str, Defect] = {"bite": _bite, "fold": _fold, "glue": _glue, "gouges": _gouges}
