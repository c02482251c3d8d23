"""Noise, cells, coordinates and blobs from which textures, objects and defects are made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy.random import Generator
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

Field = Float32[np.ndarray, "S S"]
Distance = Float[np.ndarray, "S S"]


def fractal_noise(rng: Generator, size_px: int, slope: float) -> Field:
    """Return noise with amplitude spectrum f^-(1 + slope), rescaled to 0..1.

    A higher slope gives smoother noise. The noise is periodic.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((size_px, size_px), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :])
    frequency[0, 0] = np.inf
    return _unit(np.fft.irfft2(spectrum * frequency ** -(1.0 + slope), s=(size_px, size_px)))


def band_noise(rng: Generator, size_px: int, sigma_px: tuple[float, float]) -> Field:
    """Return white noise blurred by (vertical, horizontal) Gaussians and rescaled to 0..1."""
    noise = rng.standard_normal((size_px, size_px), dtype=np.float32)
    return _unit(gaussian_filter(noise, sigma_px, mode="wrap", truncate=3.0))


def _unit(field: np.ndarray) -> Field:
    low, high = np.percentile(field, (0.5, 99.5))
    return np.asarray(np.clip((field - low) / max(high - low, 1e-9), 0, 1), np.float32)


def plane(rng: Generator, size_px: int, period_px: float, angle: float, wobble: float = 0.0) -> tuple[Field, Field]:
    """Return coordinates (u, v) in periods, turned by `angle` (radians) and shifted at random.

    `wobble` is the amplitude of a smooth random distortion, in periods.
    """
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period_px + rng.uniform(0, 64)
    v = (-x * np.sin(angle) + y * np.cos(angle)) / period_px + rng.uniform(0, 64)
    if wobble > 0:
        u = u + wobble * (fractal_noise(rng, size_px, 1.2) - 0.5)
        v = v + wobble * (fractal_noise(rng, size_px, 1.2) - 0.5)
    return np.asarray(u, np.float32), np.asarray(v, np.float32)


def cells(rng: Generator, size_px: int, spacing_px: float) -> tuple[Field, Field, np.ndarray]:
    """Return Worley cells: distances (px) to the nearest and second nearest seed, and the nearest seed's number."""
    margin = 2 * spacing_px
    count = int(((size_px + 2 * margin) / spacing_px) ** 2)
    seeds = rng.uniform(-margin, size_px + margin, (count, 2))
    y, x = np.mgrid[0:size_px, 0:size_px]
    distance, nearest = cKDTree(seeds).query(np.stack([y.ravel(), x.ravel()], -1), k=2)
    shape = (size_px, size_px)
    first, second = (distance[:, k].reshape(shape).astype(np.float32) for k in (0, 1))
    return first, second, nearest[:, 0].reshape(shape)


@dataclass(frozen=True)
class Spot:
    """Coordinates of an object: x and y are about -1..1, with half its size as unit. `px` is a pixel's width."""

    x: Field
    y: Field
    px: float

    def cover(self, distance: Distance) -> Field:
        """Return the anti-aliased coverage of the area with `distance` < 0."""
        return np.asarray(np.clip(0.5 - distance / self.px, 0, 1), np.float32)


def place_object(rng: Generator, size_px: int, *, turn: bool) -> Spot:
    """Return the coordinates of an object near the middle, turned by a random angle if `turn`."""
    half = size_px * rng.uniform(0.33, 0.44)
    middle = size_px / 2 + rng.uniform(-0.06, 0.06, 2) * size_px
    angle = rng.uniform(0, 2 * np.pi) if turn else rng.uniform(-0.05, 0.05)
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32)
    y, x = (y - middle[0]) / half, (x - middle[1]) / half
    turned_x = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32)
    return Spot(turned_x, (-x * np.sin(angle) + y * np.cos(angle)).astype(np.float32), 1.0 / half)


def random_pixel(rng: Generator, region: Bool[np.ndarray, "S S"]) -> tuple[float, float]:
    """Return a random pixel (y, x) of the region."""
    inside = np.flatnonzero(region)
    y, x = divmod(int(rng.choice(inside)), region.shape[1])
    return float(y), float(x)


def blob(rng: Generator, region: Bool[np.ndarray, "S S"], radius: tuple[float, float]) -> Field:
    """Return a random shape with soft edges inside the region, 0..1. `radius` is a range in fractions of the side."""
    size_px = region.shape[0]
    cy, cx = random_pixel(rng, region)
    r = size_px * rng.uniform(*radius)
    stretch, angle = rng.uniform(0.5, 1.0), rng.uniform(0, np.pi)
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32)
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)
    ragged = 0.9 * (fractal_noise(rng, size_px, rng.uniform(0.6, 1.4)) - 0.5)
    distance = np.hypot(along, across / stretch) / r + ragged
    soft = rng.uniform(0.04, 0.3)
    return np.asarray(np.clip((1.0 - distance) / soft, 0, 1) * region, np.float32)


def stroke(
    rng: Generator,
    region: Bool[np.ndarray, "S S"],
    *,
    length: tuple[float, float],
    width_px: tuple[float, float],
    bend: float,
) -> Field:
    """Return a line that starts in the region, 0..1.

    `length` is a range in fractions of the side. `bend` is the standard deviation of the turn per step, in radians.
    """
    size_px = region.shape[0]
    y, x = random_pixel(rng, region)
    steps = max(int(size_px * rng.uniform(*length) / 2), 3)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    ys, xs = y + np.cumsum(2 * np.sin(heading)), x + np.cumsum(2 * np.cos(heading))
    line = line_through(ys, xs, rng.uniform(*width_px), size_px)
    return np.where(region, line, np.float32(0))


def line_through(ys: np.ndarray, xs: np.ndarray, width_px: float, size_px: int) -> Field:
    """Return an anti-aliased line through dense points as a field 0..1."""
    grid_y, grid_x = np.mgrid[0:size_px, 0:size_px]
    distance, _ = cKDTree(np.stack([ys, xs], -1)).query(
        np.stack([grid_y.ravel(), grid_x.ravel()], -1), distance_upper_bound=width_px + 3.0
    )
    return np.asarray(np.clip(width_px / 2 + 0.8 - distance, 0, 1).reshape(size_px, size_px), np.float32)
