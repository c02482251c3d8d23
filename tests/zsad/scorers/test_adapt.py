"""Tests of the adaptation against a literal transcription with torch's Linear and AdamW, one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from medad.base.errors import ConfigError
from tests.zsad.feature_sets import unit
from zsad.config.run import AdaptSettings
from zsad.scorers.dual.adapt import adapt, corrupt, crop_generator, patch_shares
from zsad.scorers.textures import GeneratedTextures

CPU = torch.device("cpu")
DIGESTS = [f"{i:064x}" for i in range(12)]


class _Batch:
    def __init__(self, images: int, patches: int = 20, dim: int = 12) -> None:
        generator = torch.Generator().manual_seed(images)
        self.patches = unit(images, patches, dim, seed=1)
        self.corrupted = normalize(self.patches + 0.7 * unit(images, patches, dim, seed=2), dim=-1)
        share = torch.rand(images, patches, generator=generator)
        self.mask = torch.where(torch.rand(images, patches, generator=generator) < 0.4, share, 0.0)
        self.target = torch.rand(images, patches, generator=generator) + 0.3
        self.text = unit(2, dim, seed=3)

    def adapt(self, settings: AdaptSettings, tau: float, rows: slice | list[int] = slice(None)) -> torch.Tensor:
        return adapt(
            self.patches[rows], self.corrupted[rows], self.mask[rows], self.target[rows], self.text, settings, tau
        )


def _literal(batch: _Batch, image: int, settings: AdaptSettings, tau: float) -> torch.Tensor:
    """Compute eq. 7-11 for one image, in double precision, patch by patch."""
    q, q_bad = batch.patches[image].double(), batch.corrupted[image].double()
    mask, a_vl = batch.mask[image].double(), batch.target[image].double()
    t_n, t_a = batch.text.double()
    g = torch.nn.Linear(q.shape[1], q.shape[1], bias=False, dtype=torch.float64)
    with torch.no_grad():
        g.weight.copy_(torch.eye(q.shape[1]))
    optimiser = torch.optim.AdamW(g.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def f(token: torch.Tensor) -> torch.Tensor:
        token = 0.5 * (g(token) + token)
        token = token / token.norm()
        normal, anomalous = torch.exp(token @ t_n / tau), torch.exp(token @ t_a / tau)
        return anomalous / (normal + anomalous)

    for _ in range(settings.steps):
        a_t = [f(token) for token in q]
        a_t_bad = [f(token) for token in q_bad]
        s_a = [patch for patch in range(len(q)) if mask[patch] != 0]
        l_pseudo = torch.zeros((), dtype=torch.float64)
        for patch in s_a:
            share = torch.exp(a_t_bad[patch]) / (torch.exp(a_t[patch]) + torch.exp(a_t_bad[patch]))
            l_pseudo = l_pseudo - mask[patch] * torch.log(share) / len(s_a)
        dot = sum((a_vl[patch] * a_t[patch] for patch in range(len(q))), torch.zeros((), dtype=torch.float64))
        length = torch.stack(a_t).square().sum().sqrt() * a_vl.square().sum().sqrt()
        loss = l_pseudo + settings.beta * (1 - dot / length)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return torch.stack([f(token) for token in q]).detach()


@pytest.mark.parametrize(
    ("settings", "tau"),
    [
        (AdaptSettings(), 1.0),
        (AdaptSettings(), 0.07),
        (AdaptSettings(steps=6, learning_rate=0.03, beta=2.0, weight_decay=0.3), 0.07),
        (AdaptSettings(steps=3, beta=0.0), 0.2),
    ],
)
def test_adaptation_is_the_equations_literally(settings: AdaptSettings, tau: float) -> None:
    batch = _Batch(3)
    ours = batch.adapt(settings, tau).double()
    before = torch.sigmoid((batch.patches @ (batch.text[1] - batch.text[0])).double() / tau)
    for image in range(3):
        expected = _literal(batch, image, settings, tau)
        moved = (expected - before[image]).abs().max()
        assert moved > 1e-4, "the comparison would be empty"
        assert (ours[image] - expected).abs().max() < 1e-3 * moved + 1e-6


def test_order_batch_and_company_change_nothing() -> None:
    batch, settings = _Batch(7, patches=36, dim=24), AdaptSettings(steps=3)
    together = batch.adapt(settings, 0.07)
    order = [4, 0, 6, 2, 5, 1, 3]
    torch.testing.assert_close(batch.adapt(settings, 0.07, order), together[order], rtol=1e-5, atol=1e-6)
    for image in range(7):
        alone = batch.adapt(settings, 0.07, slice(image, image + 1))
        torch.testing.assert_close(alone[0], together[image], rtol=1e-5, atol=1e-6)


def test_equal_images_get_equal_scores_in_one_batch() -> None:
    batch = _Batch(2)
    twice = batch.adapt(AdaptSettings(), 1.0, [1, 0, 1])
    torch.testing.assert_close(twice[0], twice[2])


def test_more_steps_lower_both_losses() -> None:
    batch, tau = _Batch(4, patches=49, dim=32), 0.07
    consistent = AdaptSettings(steps=30, beta=50.0, weight_decay=0.0)
    # the target is unrelated to the map: with a large beta the cosine must rise
    before, after = (batch.adapt(s, tau) for s in (AdaptSettings(learning_rate=1e-9), consistent))
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(after, batch.target) > cosine(before, batch.target)).all()
    # with beta 0, clean patches under the mask must look more normal
    apart = batch.adapt(AdaptSettings(steps=30, beta=0.0, weight_decay=0.0), tau)
    masked = batch.mask > 0
    assert apart[masked].mean() < before[masked].mean() - 0.01


def test_nothing_masked_and_no_beta_leaves_only_the_decay() -> None:
    batch = _Batch(2)
    batch.mask = torch.zeros_like(batch.mask)
    still = batch.adapt(AdaptSettings(beta=0.0, weight_decay=0.0, steps=5), 0.07)
    plain = torch.sigmoid(batch.patches @ (batch.text[1] - batch.text[0]) / 0.07)
    torch.testing.assert_close(still, plain, rtol=1e-5, atol=1e-6)


def test_inputs_made_under_inference_mode_do() -> None:
    with torch.inference_mode():
        inside = _Batch(2).adapt(AdaptSettings(), 1.0)
    made = _Batch(2)
    torch.testing.assert_close(inside, made.adapt(AdaptSettings(), 1.0))
    with torch.inference_mode():
        batch = _Batch(2)
    outside = batch.adapt(AdaptSettings(), 1.0)
    torch.testing.assert_close(inside, outside)
    assert not outside.requires_grad


def _crops(count: int, size_px: int) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))


def _generators(rows: range | list[int], seed: int = 0) -> list[torch.Generator]:
    return [crop_generator(seed, DIGESTS[row], 0) for row in rows]


def test_a_corrupted_image_is_its_own_in_any_company() -> None:
    crops, settings = _crops(12, 48), AdaptSettings(min_mask_patches=3)
    together = corrupt(crops, _generators(range(12)), 6, settings, GeneratedTextures())
    order = [7, 2, 11]
    some = corrupt(crops[order], _generators(order), 6, settings, GeneratedTextures())
    torch.testing.assert_close(some.images, together.images[order])
    assert torch.equal(some.mask, together.mask[order])
    assert ((together.mask > 0).sum(1) >= 3).all(), "drawn again until enough patches are touched"
    other = corrupt(crops, _generators(range(12), seed=1), 6, settings, GeneratedTextures())
    assert not torch.equal(other.mask, together.mask)


def test_corruption_stays_inside_its_mask_and_is_as_opaque_as_told() -> None:
    crops = _crops(8, 48)
    low, high = 0.2, 0.5
    made = corrupt(crops, _generators(range(8)), 6, AdaptSettings(opacity=(low, high)), GeneratedTextures())
    texture = GeneratedTextures().draw(_generators(range(8)), 48, CPU)
    changed = (made.images != crops).any(1)
    patches = changed.view(8, 6, 8, 6, 8).any(4).any(2).flatten(1)
    assert (patches <= (made.mask > 0)).all()
    # I' = I + opacity (T - I), with one opacity per image for all painted pixels
    ratio = (made.images - crops) / (texture - crops)
    for image in range(8):
        opaque = ratio[image][(texture - crops)[image].abs().gt(0.1) & changed[image]]
        assert low <= opaque.min()
        assert opaque.max() <= high
        assert opaque.std() < 1e-4


def test_patch_shares_count_pixels() -> None:
    painted = torch.zeros(1, 12, 12)
    painted[0, :4, 4:8] = 1
    painted[0, 8, 11] = 1
    expected = [[0, 1, 0], [0, 0, 0], [0, 0, 1 / 16]]
    torch.testing.assert_close(patch_shares(painted, 3), torch.tensor(expected).flatten()[None])


def test_masks_that_cannot_be_are_one_line() -> None:
    with pytest.raises(ConfigError, match="min_mask_patches = 37 of 36 patches"):
        corrupt(_crops(2, 24), _generators(range(2)), 6, AdaptSettings(min_mask_patches=37), GeneratedTextures())


def test_generators_differ_by_seed_image_and_crop() -> None:
    first = [
        torch.rand((), generator=crop_generator(seed, digest, crop)).item()
        for seed in range(3)
        for digest in DIGESTS
        for crop in range(3)
    ]
    assert len(set(first)) == len(first)
