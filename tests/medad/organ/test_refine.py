"""The refinement: a rough map of a ball becomes the ball, and a touching organ stays outside."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medad.organ.refine import dice, largest_piece, refine

SPACING_MM = (2.5, 2.5, 2.5)
PLACES = np.indices((64, 64, 64)) * 2.5 - 80


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    inside: np.ndarray = sum((axis - c) ** 2 for axis, c in zip(PLACES, centre, strict=True)) < radius**2
    return inside


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return HU of a liver with a neighbour in fat, the liver, and a logit that is too small and 5 mm off its place."""
    liver, neighbour = ball((0, 0, 0), 45), ball((0, 65, 0), 25)
    hu = np.full(liver.shape, -100, np.float32)
    hu[neighbour], hu[liver] = 40, 105
    hu += np.random.default_rng(0).normal(0, 8, hu.shape).astype(np.float32)
    rough = ndimage.gaussian_filter(ball((5, 0, 0), 39).astype(np.float32), 2)
    return hu, liver, (8 * (rough - 0.5)).astype(np.float32)


def test_the_border_follows_the_hu() -> None:
    hu, liver, logit = scene()
    refined = refine(hu, logit, SPACING_MM)
    assert refined is not None
    assert dice(refined.field > 0, liver) > max(0.96, dice(logit > 0, liver))
    assert abs(refined.liver_hu - 105) < 5
    assert 0.8 < refined.sureness <= 1


def test_a_dark_tumour_is_kept() -> None:
    hu, liver, logit = scene()
    tumour = ball((15, 0, 0), 15)
    hu[tumour] -= 40
    refined = refine(hu, logit, SPACING_MM)
    assert refined is not None
    assert (refined.field > 0)[tumour].mean() > 0.95
    assert dice(refined.field > 0, liver) > 0.95


def test_nothing_is_found_where_the_network_finds_nothing() -> None:
    hu, _, logit = scene()
    assert refine(hu, logit - 20, SPACING_MM) is None


def test_pieces_and_dice() -> None:
    first, second = np.zeros((6, 4, 4), bool), np.zeros((6, 4, 4), bool)
    first[:2], first[4:5], second[:1] = True, True, True
    assert largest_piece(first).sum() == 32
    assert dice(first, second) == 2 * 16 / (48 + 16)
    assert dice(second & ~second, second & ~second) == 0
