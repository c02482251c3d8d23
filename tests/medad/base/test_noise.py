"""Comparison of Algorithm 1 with the same algorithm written per image with SciPy and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from medad.base import noise


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "sigma"), [((64, 64), 15.0), ((48, 80), 3.0), ((33, 17), 0.7)])
def test_blur_is_scipys(shape: tuple[int, int], sigma: float) -> None:
    image = _random(2, 1, *shape)
    expected = [ndimage.gaussian_filter(plane[0].double().numpy(), sigma) for plane in image]
    np.testing.assert_allclose(noise.gaussian_blur(image, sigma)[:, 0], expected, atol=2e-6)


def test_blur_keeps_a_constant() -> None:
    flat = torch.full((1, 1, 40, 40), 3.0)
    torch.testing.assert_close(noise.gaussian_blur(flat, 15.0), flat)


def test_nine_pixel_ellipse_by_hand() -> None:
    rows = ["....#....", ".#######.", ".#######.", "#########", "#########"]
    expected = [[cell == "#" for cell in row] for row in [*rows, *rows[3::-1]]]
    assert noise.ellipse(9).tolist() == expected


@given(
    side=st.sampled_from([1, 3, 5, 7, 9, 13]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    density=st.sampled_from([0.02, 0.5, 0.95]),
    seed=st.integers(0, 2**31),
)
def test_morphology_is_scipys(side: int, shape: tuple[int, int], density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((2, 1, *shape)) < density
    element = noise.ellipse(side).numpy()
    dilated = noise.dilate(torch.from_numpy(mask), side).numpy()
    eroded = noise.erode(torch.from_numpy(mask), side).numpy()
    for before, bigger, smaller in zip(mask[:, 0], dilated[:, 0], eroded[:, 0], strict=True):
        np.testing.assert_array_equal(bigger, ndimage.binary_dilation(before, element))
        np.testing.assert_array_equal(smaller, ndimage.binary_erosion(before, element, border_value=1))


def test_opening_and_closing_are_idempotent_and_bounded() -> None:
    mask = _random(3, 1, 60, 60, seed=3) > 0.3
    opened = noise.dilate(noise.erode(mask, 5), 5)
    assert (opened <= mask).all()
    torch.testing.assert_close(noise.dilate(noise.erode(opened, 5), 5), opened)
    result = noise.open_close(mask, 5)
    assert (opened <= result).all()
    torch.testing.assert_close(noise.open_close(result, 5), result)


def test_stretch_reaches_both_ends_of_each_image() -> None:
    stretched = noise.stretch(_random(4, 1, 16, 16) * torch.tensor([1.0, 5, 0.1, 100]).view(4, 1, 1, 1))
    torch.testing.assert_close(stretched.amin((1, 2, 3)), torch.zeros(4))
    torch.testing.assert_close(stretched.amax((1, 2, 3)), torch.full((4,), 255.0), atol=1e-3, rtol=0)
    assert (noise.stretch(torch.full((1, 1, 8, 8), 7.0)) == 0).all()


def test_blobs_equal_the_per_image_algorithm() -> None:
    field = _random(6, 1, 128, 128, seed=7)
    ours = noise.blob_masks(field, blur_sigma_px=8.0, threshold_grey=200.0, ellipse_px=9)
    element = noise.ellipse(9).numpy()
    for plane, mask in zip(field[:, 0].double().numpy(), ours[:, 0].numpy(), strict=True):
        blurred = ndimage.gaussian_filter(plane, 8.0)
        grey = (blurred - blurred.min()) / np.ptp(blurred) * 255
        opened = ndimage.binary_dilation(ndimage.binary_erosion(grey > 200, element, border_value=1), element)
        closed = ndimage.binary_erosion(ndimage.binary_dilation(opened, element), element, border_value=1)
        np.testing.assert_array_equal(mask, closed)
    assert ours.any()


def test_lower_threshold_never_shrinks_a_blob_before_morphology() -> None:
    grey = noise.stretch(noise.gaussian_blur(_random(2, 1, 64, 64, seed=5), 6.0))
    assert ((grey > 200) <= (grey > 180)).all()
