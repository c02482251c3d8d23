"""More objects for the training, with corners, teeth, lobes, slots, holes, rows, rings and spokes.

They are needed because a model that has seen few normal outlines takes an unknown outline for damage.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from zsad.embedded.scenes.fields import Field, Spot
from zsad.embedded.scenes.shapes import box, disc, polar, polygon, rim, ring_of_discs, sawtooth


def _render(spot: Spot, distance: np.ndarray, tone: np.ndarray) -> tuple[Field, Field]:
    return spot.cover(distance), np.asarray(np.broadcast_to(tone, spot.x.shape), np.float32)


def _bracket(style: Generator, spot: Spot) -> tuple[Field, Field]:
    arm = style.uniform(0.2, 0.32)
    upright = box(spot, arm, 0.9, 0.06, at=(-0.9 + arm, 0.0))
    foot = box(spot, 0.9, arm, 0.06, at=(0.0, 0.9 - arm))
    distance = np.minimum(upright, foot)
    for at in ((-0.9 + arm, -0.55), (0.5, 0.9 - arm), (-0.9 + arm, 0.9 - arm)):
        distance = np.maximum(distance, -disc(spot, arm * 0.4, at))
    return _render(spot, distance, 0.4 + 0.5 * rim(distance, 0.2))


def _flange(style: Generator, spot: Spot) -> tuple[Field, Field]:
    holes = ring_of_discs(spot, int(style.integers(3, 9)), 0.68, style.uniform(0.07, 0.14))
    distance = np.maximum(np.maximum(disc(spot, 0.95), -holes), style.uniform(0.15, 0.4) - polar(spot)[0])
    return _render(spot, distance, 0.3 + 0.6 * rim(distance, 0.12))


def _comb(style: Generator, spot: Spot) -> tuple[Field, Field]:
    per_unit, depth = style.uniform(3, 8), style.uniform(0.3, 0.7)
    teeth = np.where(sawtooth(spot.x, per_unit) < style.uniform(0.4, 0.7), -0.05, 0.05)
    back = box(spot, 0.95, 0.55, 0.05)
    distance = np.where(spot.y > 0.55 - depth, np.maximum(back, teeth), back)
    return _render(spot, distance, 0.6 + 0.3 * np.cos(spot.y * 4))


def _saw(style: Generator, spot: Spot) -> tuple[Field, Field]:
    height = style.uniform(0.1, 0.22)
    lower = spot.y - 0.3 - height * sawtooth(spot.x + 0.3 * spot.y * style.integers(0, 2), style.uniform(2, 6))
    distance = np.maximum(np.maximum(lower, -0.45 - spot.y), np.abs(spot.x) - 0.95)
    return _render(spot, distance, 0.4 + 0.4 * (np.abs(spot.y + 0.25) < 0.04) + 0.2 * spot.y)


def _fitting(style: Generator, spot: Spot) -> tuple[Field, Field]:
    width = style.uniform(0.2, 0.34)
    along, across = box(spot, 0.92, width, 0.04), box(spot, width, 0.92, 0.04)
    if style.random() < 0.5:
        across = np.maximum(across, -spot.y)  # a T
    distance = np.minimum(along, across)
    return _render(spot, distance, 0.35 + 0.5 * np.cos(np.minimum(np.abs(spot.x), np.abs(spot.y)) / width * 1.4))


def _sieve(style: Generator, spot: Spot) -> tuple[Field, Field]:
    n = style.uniform(3, 7)
    hole = np.hypot((spot.x * n) % 1 - 0.5, (spot.y * n) % 1 - 0.5) / n
    plate = disc(spot, 0.95) if style.random() < 0.6 else box(spot, 0.9, 0.7, 0.1)
    inner = plate + 0.12
    distance = np.maximum(plate, np.where(inner < 0, style.uniform(0.2, 0.36) / n - hole, -1.0))
    return _render(spot, distance, 0.5 + 0.4 * rim(plate, 0.3))


def _connector(style: Generator, spot: Spot) -> tuple[Field, Field]:
    half_y, n = style.uniform(0.3, 0.6), style.uniform(2.5, 6)
    shell = box(spot, 0.95, half_y, 0.1)
    pins = np.maximum(np.abs((spot.x * n) % 1 - 0.5), np.abs((spot.y * n) % 1 - 0.5)) < style.uniform(0.15, 0.3)
    return _render(spot, shell, np.where(shell < -0.12, np.where(pins, 0.95, 0.1), 0.55))


def _fan(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, angle = polar(spot)
    blades = int(style.integers(3, 8))
    swept = np.cos(blades * (angle + style.uniform(0, 1.2) * radius))
    blade = np.maximum(radius - 0.95, (style.uniform(-0.3, 0.3) - swept) * radius * 0.3)
    distance = np.minimum(blade, radius - 0.28)
    return _render(spot, distance, np.where(radius < 0.2, 0.9, 0.35 + 0.4 * radius))


def _bearing(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, _ = polar(spot)
    balls = ring_of_discs(spot, int(style.integers(6, 12)), 0.65, 0.14)
    distance = np.maximum(radius - 0.95, style.uniform(0.25, 0.4) - radius)
    race = np.abs(radius - 0.65) < 0.15
    return _render(spot, distance, np.where(balls < 0, 0.95, np.where(race, 0.1, 0.55)))


def _vent(style: Generator, spot: Spot) -> tuple[Field, Field]:
    half_y, n = style.uniform(0.5, 0.9), style.uniform(2.5, 7)
    plate = box(spot, 0.92, half_y, 0.08)
    slot = np.abs((spot.y * n) % 1 - 0.5) - style.uniform(0.15, 0.3)
    inside = np.maximum(np.abs(spot.x) - 0.75, np.abs(spot.y) - half_y + 0.15)
    return _render(spot, plate, np.where(np.maximum(slot, inside) < 0, 0.05, 0.7))


def _spring(style: Generator, spot: Spot) -> tuple[Field, Field]:
    width = style.uniform(0.3, 0.5)
    wave = width * (2 * sawtooth(spot.x, style.uniform(1.5, 4)) - 1)
    distance = np.maximum(np.abs(spot.y - wave) - style.uniform(0.1, 0.2), np.abs(spot.x) - 0.95)
    return _render(spot, distance, 0.4 + 0.5 * np.cos((spot.y - wave) * 8))


def _button(style: Generator, spot: Spot) -> tuple[Field, Field]:
    holes = ring_of_discs(spot, int(style.choice([2, 4])), 0.22, 0.09)
    edge = disc(spot, 0.9)
    dish = np.abs(polar(spot)[0] - style.uniform(0.5, 0.7)) < 0.05
    return _render(spot, np.maximum(edge, -holes), np.where(dish, 0.2, 0.4 + 0.5 * rim(edge, 0.5)))


def _clip(style: Generator, spot: Spot) -> tuple[Field, Field]:
    wire = style.uniform(0.06, 0.12)
    loops = [np.abs(box(spot, 0.9 - 0.22 * k, 0.45 - 0.16 * k, 0.3 - 0.1 * k)) - wire for k in range(2)]
    distance = np.minimum(loops[0], loops[1])
    return _render(spot, distance, 0.4 + 0.6 * rim(distance, wire))


def _spacer(style: Generator, spot: Spot) -> tuple[Field, Field]:
    outline = polygon(spot, int(style.choice([3, 4, 5, 8])), 0.7)
    bore = polygon(spot, int(style.choice([3, 4, 8])), style.uniform(0.15, 0.35))
    distance = np.maximum(outline, -bore)
    return _render(spot, distance, 0.3 + 0.6 * rim(distance, style.uniform(0.1, 0.4)))


def _badge(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, angle = polar(spot)
    points = float(style.integers(4, 10))
    reach = style.uniform(0.5, 0.75) + (0.95 - 0.62) * sawtooth(angle / (2 * np.pi), points)
    face = np.where(radius < 0.35, 0.9, 0.3 + 0.3 * sawtooth(angle / (2 * np.pi), 2 * points))
    return _render(spot, radius - reach, face)


def _lid(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, angle = polar(spot)
    knurl = np.sign(np.cos(style.integers(20, 40) * angle))
    rings = 0.5 + 0.4 * np.cos(radius * np.pi * style.integers(2, 6))
    return _render(spot, radius - 0.9, np.where(radius < 0.75, rings, 0.5 + 0.5 * knurl))


def _resistor(style: Generator, spot: Spot) -> tuple[Field, Field]:
    body = box(spot, 0.6, style.uniform(0.2, 0.35), 0.15)
    wire = box(spot, 0.95, 0.05)
    bands = np.zeros(spot.x.shape, np.float32)
    for at in np.linspace(-0.4, 0.4, int(style.integers(3, 6))):
        bands = np.where(np.abs(spot.x - at) < 0.05, style.uniform(0, 1), bands)
    return _render(spot, np.minimum(body, wire), np.where(body < 0, np.where(bands > 0, bands, 0.6), 0.9))


def _wheel(style: Generator, spot: Spot) -> tuple[Field, Field]:
    radius, angle = polar(spot)
    spokes = int(style.integers(3, 9))
    spoke = np.abs(np.sin(angle * spokes / 2)) * radius - style.uniform(0.06, 0.12)
    rim_of_wheel = np.abs(radius - 0.82) - style.uniform(0.08, 0.14)
    distance = np.minimum(np.minimum(rim_of_wheel, radius - 0.25), np.maximum(spoke, radius - 0.85))
    return _render(spot, distance, 0.4 + 0.5 * rim(distance, 0.1))


def _ladder(style: Generator, spot: Spot) -> tuple[Field, Field]:
    half_y = style.uniform(0.3, 0.6)
    rails = np.abs(np.abs(spot.y) - half_y) - 0.09
    rungs = np.maximum(np.abs((spot.x * style.uniform(1.5, 4)) % 1 - 0.5) - 0.15, np.abs(spot.y) - half_y)
    distance = np.maximum(np.minimum(rails, rungs), np.abs(spot.x) - 0.95)
    return _render(spot, distance, 0.5 + 0.4 * np.cos(rails * 15))


def _dice(style: Generator, spot: Spot) -> tuple[Field, Field]:
    body = box(spot, 0.8, 0.8, style.uniform(0.05, 0.3))
    at = style.uniform(0.4, 0.5)
    spots = [(sx * at, sy * at) for sx in (-1, 1) for sy in (-1, 0, 1) if style.random() < 0.8]
    pips = np.min([disc(spot, style.uniform(0.12, 0.17), centre) for centre in [*spots, (0.0, 0.0)]], axis=0)
    return _render(spot, body, np.where(pips < 0, 0.05, 0.6 + 0.4 * rim(body, 0.4)))


def _scale(style: Generator, spot: Spot) -> tuple[Field, Field]:
    bar = box(spot, 0.95, style.uniform(0.25, 0.45), 0.03)
    fine = style.uniform(5, 10)
    marks = (sawtooth(spot.x, fine) > 0.7) & (spot.y < -0.05 - 0.1 * (sawtooth(spot.x, fine / 5) < 0.8))
    return _render(spot, bar, np.where(marks, 0.05, 0.8))


def _handle(style: Generator, spot: Spot) -> tuple[Field, Field]:
    wave = 0.05 * np.cos(spot.x * style.uniform(8, 20))
    grip = np.maximum(np.abs(spot.y) - style.uniform(0.25, 0.4) - wave, np.abs(spot.x + 0.35) - 0.55)
    rod = box(spot, 0.5, style.uniform(0.05, 0.12), at=(0.45, 0.0))
    return _render(spot, np.minimum(grip, rod), np.where(grip < 0, 0.4 + 0.4 * np.cos(spot.y * 5), 0.95))


PARTS = {
    "bracket": _bracket,
    "flange": _flange,
    "comb": _comb,
    "saw blade": _saw,
    "pipe fitting": _fitting,
    "sieve": _sieve,
    "connector": _connector,
    "fan": _fan,
    "bearing": _bearing,
    "vent": _vent,
    "spring": _spring,
    "button": _button,
    "clip": _clip,
    "spacer": _spacer,
    "badge": _badge,
    "lid": _lid,
    "resistor": _resistor,
    "wheel": _wheel,
    "ladder": _ladder,
    "dice": _dice,
    "scale": _scale,
    "handle": _handle,
}
