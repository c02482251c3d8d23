"""Textures as tones 0..1. `style` fixes what all images of a product share, `rng` what differs between images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from zsad.embedded.scenes.fields import Field, band_noise, cells, fractal_noise, plane

Texture = Callable[[Generator, Generator, int], Field]


def _wave(phase: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(2 * np.pi * phase)


def _angle(style: Generator) -> float:
    return float(style.choice([0.0, np.pi / 4, style.uniform(0, np.pi)]))


def _stripes(style: Generator, rng: Generator, size_px: int) -> Field:
    u, _ = plane(rng, size_px, style.uniform(8, 40), _angle(style), 0.1)
    return np.asarray(np.clip(_wave(u) * style.uniform(1, 4), 0, 1), np.float32)


def _weave(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(8, 28), _angle(style), 0.15)
    over = (np.floor(u) + np.floor(v)) % 2
    thread = np.where(over > 0, np.sin(np.pi * (u % 1)), np.sin(np.pi * (v % 1)))
    return np.asarray(thread * (0.6 + 0.4 * over), np.float32)


def _checks(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(10, 36), _angle(style), 0.05)
    return np.asarray((np.floor(u) + np.floor(v)) % 2, np.float32)


def _bricks(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(18, 44), float(style.choice([0.0, np.pi / 2])), 0.1)
    row = np.floor(v * 2)
    column = np.floor(u + 0.5 * (row % 2))
    joint = np.minimum((u + 0.5 * (row % 2)) % 1, (v * 2) % 1 / 2)
    shade = np.modf(np.abs(np.sin(row * 12.9898 + column * 78.233) * 43758.5453))[0]
    return np.asarray(
        np.where(joint < style.uniform(0.05, 0.1), 0.0, 0.5 + 0.5 * shade * style.uniform(0.2, 1)), np.float32
    )


def _dots(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(12, 36), _angle(style), 0.08)
    radius = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    return np.asarray(np.clip((style.uniform(0.2, 0.42) - radius) * 12, 0, 1), np.float32)


def _wood(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(10, 30), float(style.choice([0.0, np.pi / 2])))
    rings = _wave(u + 1.5 * band_noise(rng, size_px, (24.0, 6.0)) + 0.02 * v)
    return np.asarray(0.75 * rings + 0.25 * band_noise(rng, size_px, (8.0, 0.7)), np.float32)


def _marble(style: Generator, rng: Generator, size_px: int) -> Field:
    u, _ = plane(rng, size_px, style.uniform(40, 90), _angle(style))
    return np.asarray(np.abs(np.sin(np.pi * (u + style.uniform(1, 3) * fractal_noise(rng, size_px, 0.7)))), np.float32)


def _brushed(style: Generator, rng: Generator, size_px: int) -> Field:
    along = style.uniform(15, 40)
    sigma = (along, 0.6) if style.random() < 0.5 else (0.6, along)
    return np.asarray(0.3 + 0.4 * band_noise(rng, size_px, sigma), np.float32)


def _hide(style: Generator, rng: Generator, size_px: int) -> Field:
    first, second, _ = cells(rng, size_px, style.uniform(6, 14))
    return np.asarray(np.clip((second - first) / 3.0, 0, 1) * 0.8 + 0.2 * fractal_noise(rng, size_px, 0.2), np.float32)


def _granite(style: Generator, rng: Generator, size_px: int) -> Field:
    sigma = style.uniform(0.8, 2.5)
    grains = [band_noise(rng, size_px, (sigma, sigma)) > level for level in (0.45, 0.6, 0.7)]
    return np.asarray(sum(grain.astype(np.float32) for grain in grains) / 3, np.float32)


def _plaster(style: Generator, rng: Generator, size_px: int) -> Field:
    return np.asarray(0.2 + 0.6 * fractal_noise(rng, size_px, style.uniform(0.1, 0.7)), np.float32)


def _sand(style: Generator, rng: Generator, size_px: int) -> Field:
    sigma = style.uniform(0.5, 1.2)
    return band_noise(rng, size_px, (sigma, sigma))


def _carpet(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(5, 10), _angle(style), 0.6)
    return np.asarray(0.5 * _wave(u) * _wave(v) + 0.5 * band_noise(rng, size_px, (1.0, 1.0)), np.float32)


def _corrugated(style: Generator, rng: Generator, size_px: int) -> Field:
    u, _ = plane(rng, size_px, style.uniform(10, 34), _angle(style))
    return np.asarray(np.abs(2 * (u % 1) - 1) * 0.9, np.float32)


def _pebbles(style: Generator, rng: Generator, size_px: int) -> Field:
    spacing = style.uniform(14, 30)
    first, second, owner = cells(rng, size_px, spacing)
    shade = np.modf(np.abs(np.sin(owner * 12.9898) * 43758.5453))[0]
    round_edge = np.clip((second - first) / (0.35 * spacing), 0, 1)
    return np.asarray(round_edge * (0.4 + 0.6 * shade), np.float32)


def _felt(style: Generator, rng: Generator, size_px: int) -> Field:
    steep, flat = band_noise(rng, size_px, (5.0, 0.7)), band_noise(rng, size_px, (0.7, 5.0))
    return np.asarray(0.5 * (steep + flat) + style.uniform(0, 0.2) * fractal_noise(rng, size_px, 0.6), np.float32)


def _smooth(style: Generator, rng: Generator, size_px: int) -> Field:
    return np.asarray(0.5 + style.uniform(0.02, 0.12) * (fractal_noise(rng, size_px, 0.3) - 0.5), np.float32)


def _mesh(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(14, 34), _angle(style), 0.06)
    wire = style.uniform(0.1, 0.2)
    return np.asarray(np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) < wire, np.float32)


def _ripples(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(12, 26), 0.0, 0.4)
    return np.asarray(_wave(np.hypot(u - u.mean() + style.uniform(-3, 3), v - v.mean())), np.float32)


def _terrazzo(style: Generator, rng: Generator, size_px: int) -> Field:
    first, second, owner = cells(rng, size_px, style.uniform(10, 22))
    shade = np.modf(np.abs(np.sin(owner * 91.345) * 47453.25))[0]
    return np.asarray(np.where((shade > 0.45) & (second - first > 2), shade, 0.15), np.float32)


def _herringbone(style: Generator, rng: Generator, size_px: int) -> Field:
    u, v = plane(rng, size_px, style.uniform(16, 36), 0.0, 0.05)
    zigzag = v + np.abs(2 * (u % 1) - 1) * 0.5
    return np.asarray(np.clip(_wave(zigzag * 2) * 2, 0, 1), np.float32)


TEXTURES: dict[str, Texture] = {
    "stripes": _stripes,
    "weave": _weave,
    "checks": _checks,
    "bricks": _bricks,
    "dots": _dots,
    "wood": _wood,
    "marble": _marble,
    "brushed metal": _brushed,
    "leather": _hide,
    "granite": _granite,
    "plaster": _plaster,
    "sandpaper": _sand,
    "carpet": _carpet,
    "corrugated sheet": _corrugated,
    "pebbles": _pebbles,
    "felt": _felt,
    "coating": _smooth,
}
HELD_OUT_TEXTURES: dict[str, Texture] = {
    "grid": _mesh,
    "ripples": _ripples,
    "terrazzo": _terrazzo,
    "herringbone": _herringbone,
}
