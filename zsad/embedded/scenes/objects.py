"""Simple objects. Each function returns coverage 0..1 and surface tone 0..1 over the object's coordinates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from zsad.embedded.scenes.fields import Field, Spot
from zsad.embedded.scenes.shapes import box, disc, polar, rim

Drawing = Callable[[Generator, Spot], tuple[Field, Field]]


def _coin(style: Generator, spot: Spot) -> tuple[Field, Field]:
    distance = disc(spot, 0.95)
    radius, _ = polar(spot)
    rings = 0.5 + 0.3 * np.cos(radius * np.pi * style.integers(3, 9))
    return spot.cover(distance), np.asarray(rim(distance, 0.3) * rings, np.float32)


def _washer(style: Generator, spot: Spot) -> tuple[Field, Field]:
    distance = np.maximum(disc(spot, 0.95), -disc(spot, style.uniform(0.35, 0.65)))
    return spot.cover(distance), rim(distance, 0.15)


def _bolt(style: Generator, spot: Spot) -> tuple[Field, Field]:
    width = style.uniform(0.16, 0.26)
    shaft = box(spot, 0.8, width, at=(0.2, 0.0))
    head = box(spot, 0.18, width * 1.9, 0.05, at=(-0.75, 0.0))
    thread = 0.5 + 0.5 * np.sin((spot.x + 0.4 * spot.y) * style.uniform(30, 60))
    tone = np.where(head < 0, 0.7, thread * np.clip(1.2 - np.abs(spot.y) / width, 0, 1))
    return spot.cover(np.minimum(shaft, head)), np.asarray(tone, np.float32)


def _flask(style: Generator, spot: Spot) -> tuple[Field, Field]:
    body = box(spot, 0.45, 0.6, 0.12, at=(0.0, 0.3))
    neck = box(spot, style.uniform(0.14, 0.24), 0.4, 0.04, at=(0.0, -0.55))
    label = box(spot, 0.36, 0.22, at=(0.0, 0.35))
    tone = np.where(label < 0, 0.95, 0.3 + 0.4 * np.cos(spot.x * 3))
    return spot.cover(np.minimum(body, neck)), np.asarray(tone, np.float32)


def _plate(style: Generator, spot: Spot) -> tuple[Field, Field]:
    half_y = style.uniform(0.5, 0.9)
    distance = box(spot, 0.9, half_y, 0.12)
    inset = style.uniform(0.18, 0.28)
    for sx in (-1, 1):
        for sy in (-1, 1):
            distance = np.maximum(distance, -disc(spot, 0.1, (sx * (0.9 - inset), sy * (half_y - inset))))
    return spot.cover(distance), np.asarray(0.5 + 0.3 * rim(distance, 0.2), np.float32)


def _blister(style: Generator, spot: Spot) -> tuple[Field, Field]:
    columns, rows = int(style.integers(2, 5)), int(style.integers(2, 5))
    card = box(spot, 0.95, 0.95 * rows / max(rows, columns), 0.08)
    u = (spot.x / 0.95 + 1) / 2 * columns
    v = (spot.y / (0.95 * rows / max(rows, columns)) + 1) / 2 * rows
    pill = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
    return spot.cover(card), np.asarray(np.clip((0.38 - pill) * 8, 0.1, 1), np.float32)


def _tablet(style: Generator, spot: Spot) -> tuple[Field, Field]:
    distance = box(spot, 0.95, style.uniform(0.45, 0.8), 0.44)
    groove = np.abs(spot.x) < 0.03
    return spot.cover(distance), np.asarray(np.where(groove, 0.2, 0.4 + rim(distance, 0.6) * 0.6), np.float32)


def _knob(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, angle = polar(spot)
    distance = radius - 0.85 - 0.1 * np.cos(style.integers(5, 12) * angle)
    return spot.cover(distance), np.asarray(np.clip(rim(distance, 0.5) + 0.3 * (radius < 0.3), 0, 1), np.float32)


def _chip(style: Generator, spot: Spot) -> tuple[Field, Field]:
    body = box(spot, 0.85, 0.5, 0.03)
    legs = np.maximum(box(spot, 0.8, 0.75), 0.5 - np.abs((spot.x * style.integers(4, 8)) % 1 - 0.5) * 4)
    mark = disc(spot, 0.08, (-0.65, -0.3))
    tone = np.where(body < 0, 0.15 + 0.5 * (mark < 0), 0.9)
    return spot.cover(np.minimum(body, legs)), np.asarray(tone, np.float32)


def _cable(style: Generator, spot: Spot) -> tuple[Field, Field]:
    sheath = disc(spot, 0.95)
    tone = np.full(spot.x.shape, 0.25, np.float32)
    count = int(style.integers(3, 6))
    for k in range(count):
        angle = 2 * np.pi * k / count
        core = disc(spot, 0.3, (0.5 * np.cos(angle), 0.5 * np.sin(angle)))
        tone = np.where(core < 0, 0.55 + 0.45 * ((k % 2) > 0) * (core < -0.08), tone)
    return spot.cover(sheath), np.asarray(tone, np.float32)


def _nut(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, angle = polar(spot)
    sector = (angle + np.pi / 6) % (np.pi / 3) - np.pi / 6
    distance = np.maximum(radius * np.cos(sector) - 0.82, style.uniform(0.35, 0.5) - radius)
    return spot.cover(distance), np.asarray(0.4 + 0.6 * rim(distance, 0.3), np.float32)


def _gear(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, angle = polar(spot)
    teeth = np.tanh(6 * np.sin(style.integers(8, 18) * angle))
    distance = np.maximum(radius - 0.83 - 0.1 * teeth, style.uniform(0.2, 0.35) - radius)
    return spot.cover(distance), np.asarray(0.3 + 0.7 * rim(distance, 0.5), np.float32)


def _brush(style: Generator, spot: Spot) -> tuple[Field, Field]:
    head = box(spot, 0.9, 0.55, 0.3)
    n = style.uniform(6, 9)
    tuft = np.hypot((spot.x * n) % 1 - 0.5, (spot.y * n) % 1 - 0.5)
    return spot.cover(head), np.asarray(np.clip((0.4 - tuft) * 6, 0.05, 1), np.float32)


def _key(style: Generator, spot: Spot) -> tuple[Field, Field]:
    bow = np.maximum(disc(spot, 0.38, (-0.55, 0.0)), -disc(spot, 0.15, (-0.62, 0.0)))
    blade = box(spot, 0.6, 0.12, at=(0.35, 0.0))
    teeth = np.maximum(box(spot, 0.4, 0.1, at=(0.5, 0.16)), 0.1 - np.abs((spot.x * style.uniform(3, 5)) % 1 - 0.5))
    distance = np.minimum(np.minimum(bow, blade), teeth)
    return spot.cover(distance), np.asarray(0.5 + 0.5 * rim(distance, 0.2), np.float32)


OBJECTS: dict[str, Drawing] = {
    "coin": _coin,
    "washer": _washer,
    "bolt": _bolt,
    "bottle": _flask,
    "plate": _plate,
    "blister pack": _blister,
    "tablet": _tablet,
    "knob": _knob,
    "chip": _chip,
    "cable": _cable,
}
HELD_OUT_OBJECTS: dict[str, Drawing] = {"nut": _nut, "gear": _gear, "brush": _brush, "key": _key}
