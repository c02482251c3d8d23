"""DRAEM's restoration loss against scikit-image. The thesis's losses are tested in test_train."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from medad.networks.losses import l2_ssim_loss, ssim_loss


def _slices(seed: int, side: int = 40) -> torch.Tensor:
    """Return slices as grey / 255, smooth enough that the similarity is neither 0 nor 1."""
    noise = torch.rand(3, 1, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear")


def _skimage(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the SSIM of a slice padded with zeros.

    scikit-image leaves out the outermost 5 px, because windows are incomplete there.
    """
    return float(
        structural_similarity(
            np.pad(one.double().numpy(), 5),
            np.pad(other.double().numpy(), 5),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def test_ssim_is_scikit_images() -> None:
    restored, clean = _slices(0), 0.7 * _slices(0) + 0.3 * _slices(1)
    expected = [1 - _skimage(a[0], b[0]) for a, b in zip(restored, clean, strict=True)]
    assert all(0.01 < value < 0.9 for value in expected)
    assert float(ssim_loss(restored, clean)) == pytest.approx(np.mean(expected), abs=1e-5)


def test_equal_slices_lose_nothing_and_opposite_ones_much() -> None:
    clean = _slices(2)
    assert float(l2_ssim_loss(clean, clean)) == pytest.approx(0, abs=1e-5)
    assert float(ssim_loss(1 - clean, clean)) > float(ssim_loss((clean + 0.5) / 2, clean)) > 0


def test_both_parts_weigh_alike_and_the_gradient_reaches_every_pixel() -> None:
    restored, clean = _slices(3).requires_grad_(), _slices(4)
    loss = l2_ssim_loss(restored, clean)
    squares = float(((restored - clean) ** 2).mean().detach())
    assert float(loss.detach()) == pytest.approx(squares + float(ssim_loss(restored, clean).detach()), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, restored)
    assert (gradient != 0).all()


def test_reduced_precision_around_it_changes_nothing() -> None:
    restored, clean = _slices(5), _slices(6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim_loss(restored, clean)
    assert torch.equal(inside, ssim_loss(restored, clean))
