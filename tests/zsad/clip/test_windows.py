"""Check windows against open_clip's forward pass on only the window's pixels, and against counts by hand."""

from __future__ import annotations

from copy import copy

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from tests.zsad.tiny_clip import ARCHITECTURES, tiny_clip, tiny_config
from zsad.clip import windows
from zsad.clip.windows import encode_windows, window_patches

GRID, PATCH_PX = 4, 8


def _images(count: int, seed: int = 1) -> Tensor:
    size = GRID * PATCH_PX
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _alone(visual: VisionTransformer, image: Tensor, top: int, left: int, side: int) -> Tensor:
    """Encode only the window's pixels, with the positions that they have in the image."""
    places = [0] + [1 + GRID * row + column for row in range(top, top + side) for column in range(left, left + side)]
    small = copy(visual)
    small._parameters = visual._parameters | {"positional_embedding": nn.Parameter(visual.positional_embedding[places])}
    rows, columns = (slice(PATCH_PX * first, PATCH_PX * (first + side)) for first in (top, left))
    encoded: Tensor = small(image[None, :, rows, columns])[0]
    return encoded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_window_is_what_the_tower_makes_of_its_pixels_alone(architecture: str) -> None:
    visual = tiny_clip(tiny_config(**ARCHITECTURES[architecture]), seed=4).visual
    images = _images(2)
    sides = (2, 1, 4, 3)
    for side, ours in zip(sides, encode_windows(visual, images, sides), strict=True):
        places = range(GRID - side + 1)
        expected = [[_alone(visual, image, top, left, side) for top in places for left in places] for image in images]
        assert ours.shape == (2, len(places) ** 2, 24)
        torch.testing.assert_close(ours, torch.stack([torch.stack(row) for row in expected]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_window_of_all_patches_is_the_image() -> None:
    model = tiny_clip(tiny_config(), seed=5)
    torch.testing.assert_close(
        encode_windows(model.visual, _images(3), [GRID])[0][:, 0], model.encode_image(_images(3)), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_parts_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    visual, images = tiny_clip(tiny_config(), seed=6).visual, _images(3)
    (whole,) = encode_windows(visual, images, [2])
    for tokens in (1, 5, 24, 95, 100):  # windows have 5 tokens: one window at once, some, and across images
        monkeypatch.setattr(windows, "CPU_TOKENS", tokens)
        torch.testing.assert_close(encode_windows(visual, images, [2])[0], whole, atol=1e-5, rtol=1e-5)


def test_patches_are_covered_as_often_as_counted_by_hand() -> None:
    # 4 x 4 patches
    by_hand = {
        1: [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        2: [[1, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]],
        3: [[1, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]],
        4: [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    }
    for side, counts in by_hand.items():
        found = window_patches(4, side).flatten().bincount(minlength=16).reshape(4, 4)
        assert found.tolist() == counts
    # WinCLIP's grid of 15 x 15 patches: a corner once, inner patches k^2 times
    for side in (2, 3):
        found = window_patches(15, side).flatten().bincount(minlength=225).reshape(15, 15)
        assert [found[0, 0].item(), found[0, 7].item(), found[7, 7].item()] == [1, side, side**2]
        assert len(window_patches(15, side)) == {2: 196, 3: 169}[side]


def test_windows_go_row_by_row() -> None:
    assert window_patches(3, 2).tolist() == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]


@pytest.mark.parametrize("side", [0, 5])
def test_a_window_that_does_not_fit_is_refused(side: int) -> None:
    with pytest.raises(ValueError, match="grid of 4 x 4"):
        window_patches(4, side)
