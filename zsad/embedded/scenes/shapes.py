"""Signed distances (negative inside) and tones over an object's coordinates, from which objects are composed."""

from __future__ import annotations

import numpy as np

from zsad.embedded.scenes.fields import Distance, Field, Spot


def box(spot: Spot, half_x: float, half_y: float, corner: float = 0.0, at: tuple[float, float] = (0.0, 0.0)) -> Field:
    """Return the signed distance to a rounded rectangle."""
    dx = np.abs(spot.x - at[0]) - half_x + corner
    dy = np.abs(spot.y - at[1]) - half_y + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return np.asarray(outside + np.minimum(np.maximum(dx, dy), 0) - corner, np.float32)


def disc(spot: Spot, radius: float, at: tuple[float, float] = (0.0, 0.0)) -> Field:
    """Return the signed distance to a disc."""
    return np.asarray(np.hypot(spot.x - at[0], spot.y - at[1]) - radius, np.float32)


def polar(spot: Spot) -> tuple[Field, Field]:
    """Return radius and angle (radians)."""
    return np.hypot(spot.x, spot.y), np.arctan2(spot.y, spot.x)


def polygon(spot: Spot, corners: int, inner_radius: float) -> Field:
    """Return the signed distance to the sides of a regular polygon."""
    radius, angle = polar(spot)
    sector = 2 * np.pi / corners
    return np.asarray(radius * np.cos((angle + sector / 2) % sector - sector / 2) - inner_radius, np.float32)


def ring_of_discs(spot: Spot, count: int, at_radius: float, radius: float) -> Field:
    """Return the signed distance to `count` discs that are evenly spaced on a circle."""
    angles = 2 * np.pi * np.arange(count) / count
    centres = [(float(at_radius * np.cos(angle)), float(at_radius * np.sin(angle))) for angle in angles]
    return np.asarray(np.min([disc(spot, radius, centre) for centre in centres], axis=0), np.float32)


def sawtooth(along: np.ndarray, per_unit: float) -> np.ndarray:
    """Return a triangle wave 0..1 with `per_unit` periods per unit."""
    return np.asarray(np.abs(2 * ((along * per_unit) % 1) - 1))


def rim(distance: Distance, width: float) -> Field:
    """Return a tone that becomes darker towards the edge."""
    return np.asarray(np.clip(0.25 - distance / width, 0, 1), np.float32)
