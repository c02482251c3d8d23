"""AnoVL, also called AnoCLIP (Deng et al. 2023): V-V patches against a domain-aware ensemble, adapted at test time.

Without adaptation it is the scorer of the dual-image paper (Zhang et al., Dual-Image Enhanced CLIP, 2024) without a
reference. The class token gives the image score, and A_L (eq. 3 of that paper) is the map. Test-time adaptation changes
only the map. A small adapter learns from the method's own pseudo-labels and from tokens with noise. The objective is
that of the authors' public code, except for the points in the table.
For the patch tokens q of an image, over all patches of all its crops:

    q_T = (G(q) + q) / 2, L2-normalised;  A_T = its share of the anomalous text at tau
    q'  = q + n, n Gaussian, a new sample in each step;  A'_T the same of q'
    L_soft = mean of -(A_L log A_T + (1 - A_L) log(1 - A_T))
    L_hard = mean of -log A'_T - log(1 - A_T)
    L = L_soft + L_hard / 2, minimised by AdamW from scratch for each image; the map is A_T after the last step

| point | authors' code | here |
|---|---|---|
| pseudo-labels in L_soft | A_T itself, so L_soft is an entropy | A_L, the map before adaptation |
| G | acts on the prompts: text features x tanh(linear layer) | one linear layer, as the dual-image paper's adapter |
| start of G | random, with a bias | the identity, without bias: before the first step A_T is A_L |
| state of AdamW | continues from image to image | reset for each image, so no score depends on the order |
| weight decay of AdamW | torch's default, 0.01 | the same |
| tokens that get noise | the projection's output | L2-normalised, as they are stored |
| several crops | not supported | one adapter per image |
| image score | mean over augmented copies of the image | the image itself, mean over crops |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from zsad.clip.feature_store import batches_by_crop_count
from zsad.scorers.anovl.settings import AnoVl
from zsad.scorers.dual.adapt import crop_generator
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import CategoryFeatures, Scored

HARD_WEIGHT = 0.5
WEIGHT_DECAY = 0.01


def score(category_features: CategoryFeatures, settings: AnoVl) -> Iterator[Scored]:
    """Score all images of a category. All scores are 0..1; higher is more anomalous.

    The scores of an image depend on its features, its digest and the seed. Other images and the order have no effect.

    Parameters
    ----------
    category_features
        Features of the category, with text.
    settings
        `tau`, and for the adaptation `steps` (0: no adaptation), `learning_rate` and `noise`.

    Raises
    ------
    InputError
        The features are damaged.
    """
    store, device = category_features.store, category_features.device
    text = category_features.text_on_device
    for numbers in batches_by_crop_count(store, category_features.batch_size):
        patches = torch.stack([store.patches(number).flatten(0, 1) for number in numbers]).to(device)
        maps = text_scores(patches, text, settings.tau)
        if settings.steps:
            digests, crops = [store.images[number].sha256 for number in numbers], range(len(store.rows_of(numbers[0])))
            generators = [
                [crop_generator(category_features.seed, digest, crop) for crop in crops] for digest in digests
            ]
            maps = adapt_to_noise(patches, maps, text, generators, settings)
        for number, image_map in zip(numbers, maps, strict=True):
            classes = text_scores(store.class_tokens(number).to(device), text, settings.tau)
            found = mean_of_neighbours(image_map.reshape(-1, store.grid, store.grid), settings.mean_patches)
            yield Scored(number, float(classes.double().mean()), found)


def mean_of_neighbours(maps: Float[Tensor, "C g g"], side: int) -> Float[Tensor, "C g g"]:
    """Average each value over its `side` x `side` square of patches. Values at the edge are repeated beyond it."""
    if side == 1:
        return maps
    padded = functional.pad(maps[:, None], [side // 2] * 4, mode="replicate")
    return functional.avg_pool2d(padded, side, stride=1)[:, 0]


def adapt_to_noise(
    patches: Float[Tensor, "B M D"],
    labels: Float[Tensor, "B M"],
    text: Float[Tensor, "2 D"],
    generators: Sequence[Sequence[torch.Generator]],
    settings: AnoVl,
) -> Float[Tensor, "B M"]:
    """Train one adapter per image, on that image only, and return A_T. The module's docstring has the equations.

    Parameters
    ----------
    patches
        Tokens of all patches of an image's crops, crop by crop, L2-normalised.
    labels
        Pseudo-labels: A_L, 0..1.
    text
        Normal and anomalous text features, L2-normalised.
    generators
        Generators of the noise, on the CPU: one per crop of each image.
    settings
        `tau`, `steps`, `learning_rate` and `noise`.

    Returns
    -------
    A_T of the tokens without noise, 0..1; higher is more anomalous.
    """
    n = patches.shape[1]
    direction = (text[1] - text[0]) / settings.tau
    with torch.enable_grad():
        # one tensor contains all adapters: AdamW updates each number independently, so this equals B optimisers
        adapter = torch.eye(patches.shape[2], dtype=patches.dtype, device=patches.device).repeat(len(patches), 1, 1)
        adapter.requires_grad_()
        optimiser = torch.optim.AdamW([adapter], lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        for _ in range(settings.steps):
            noisy = patches + settings.noise * _noise(generators, patches)
            logits = _adapted_logits(torch.cat((patches, noisy), 1), adapter, direction)
            clean, spoilt = logits[:, :n], logits[:, n:]
            # -log A = softplus(-logit), -log(1 - A) = softplus(logit)
            loss_soft = (functional.softplus(clean) - labels * clean).mean(1)
            loss_hard = (functional.softplus(-spoilt) + functional.softplus(clean)).mean(1)
            optimiser.zero_grad()
            # a sum over images: the gradient of each adapter depends on its own image only
            torch.autograd.backward((loss_soft + HARD_WEIGHT * loss_hard).sum())
            optimiser.step()
    with torch.no_grad():
        return torch.sigmoid(_adapted_logits(patches, adapter, direction))


def _noise(generators: Sequence[Sequence[torch.Generator]], patches: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
    """Return Gaussian noise of standard deviation 1, crop by crop."""
    size = (patches.shape[1] // len(generators[0]), patches.shape[2])
    drawn = [torch.cat([torch.randn(size, generator=generator) for generator in crops]) for crops in generators]
    return torch.stack(drawn).to(patches)


def _adapted_logits(
    tokens: Float[Tensor, "B M D"], adapter: Float[Tensor, "B D D"], direction: Float[Tensor, " D"]
) -> Float[Tensor, "B M"]:
    adapted: Tensor = functional.normalize((tokens @ adapter.mT + tokens) / 2, dim=-1) @ direction
    return adapted
