"""MuSc (Li et al., ICLR 2024), and MuSc-2, the same with drawn references alone (002, table 1): no text, no training.

Patches of several blocks of the tower; local neighbourhood aggregation with multiple degrees (LNAMD, `aggregate`); the
mutual scoring mechanism (MSM, `zsad.scorers.mutual`); re-scoring with constrained image-level neighbourhood (RsCIN,
`rescore`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from zsad.config.systems import MuSc, MuSc2
from zsad.scorers.interface import CategoryFeatures, Scored
from zsad.scorers.mutual import largest_cosines, lowest_mean, mutual_scores, operand


def score(category_features: CategoryFeatures, settings: MuSc | MuSc2) -> Iterator[Scored]:
    """Score a category's images; scores and maps are distances, 0..2, higher is more anomalous.

    An image's map is the mean over blocks and degrees of its patches' scores, its score the map's maximum; for MuSc,
    re-scored. An image of several crops is one image: its memory is all patches of all its crops.

    For MuSc all images come at the end, since each is scored by all: the maps of all are held, and what
    `zsad.scorers.mutual.mutual_scores` holds. For MuSc-2 they come one by one.

    Raises
    ------
    InputError
        Features are missing or damaged, or there is no other image to compare with.
    """
    if isinstance(settings, MuSc2):
        return _against_references(category_features, settings)
    return _against_all(category_features, settings)


def _against_all(category_features: CategoryFeatures, settings: MuSc) -> Iterator[Scored]:
    store = category_features.store
    sizes = [image.rows * store.grid**2 for image in store.images]
    if len(sizes) == 1:
        raise InputError(
            category_features.paths[0], f"{settings.title} needs another image to compare with, and there is none"
        )
    maps = [torch.zeros(size) for size in sizes]
    passes = [(output, degree) for output in settings.outputs for degree in settings.degrees]
    for output, degree in passes:
        read = partial(read_patches, category_features, output, degree)
        for number, found in mutual_scores(
            read, sizes, settings.share, category_features.batch_size, category_features.device
        ):
            maps[number] += found.cpu() / len(passes)
    scores = torch.stack([patches.max() for patches in maps]).double()
    if settings.neighbours:
        scores = rescore(scores, _class_tokens(category_features), settings.neighbours)
    for number, patches in enumerate(maps):
        yield Scored(number, float(scores[number]), _by_crop(category_features, patches))


def _against_references(category_features: CategoryFeatures, settings: MuSc2) -> Iterator[Scored]:
    passes = [(output, degree) for output in settings.outputs for degree in settings.degrees]
    for number, references in enumerate(category_features.drawn.tolist()):
        found = []
        for output, degree in passes:
            query = operand(read_patches(category_features, output, degree, number))
            others = (operand(read_patches(category_features, output, degree, reference)) for reference in references)
            cosines = torch.stack([largest_cosines(query, other)[0] for other in others])
            found.append(lowest_mean(cosines, settings.share))
        patches = torch.stack(found).mean(0).cpu()
        yield Scored(number, float(patches.max()), _by_crop(category_features, patches))


def read_patches(category_features: CategoryFeatures, output: str, degree: int, number: int) -> Float[Tensor, "P W"]:
    """All patches of all crops of one image, aggregated, on the category_features's device. Raises InputError."""
    patches = category_features.store.view(number, output)[:, 1:].to(category_features.device)
    return aggregate(patches, category_features.store.grid, degree).flatten(0, 1)


def aggregate(patches: Float[Tensor, "C N W"], grid: int, degree: int) -> Float[Tensor, "C N W"]:
    """LNAMD with one degree: what `degree` x `degree` neighbouring patches have in common, L2-normalised.

    Each crop's map is normalised to mean 0 and variance 1 over channels and places together (LayerNorm over C, H and W
    without gain or bias, epsilon 1e-5), then averaged over the neighbourhood of each patch. Outside the map are zeros,
    as in the public code; whether these count in the average changes nothing, since the length is normalised away.

    Parameters
    ----------
    patches
        Tokens of one block, without the class token, row by row.
    grid
        Patches a side.
    degree
        r, odd. 1: each patch alone.
    """
    normed = functional.layer_norm(patches, patches.shape[1:])
    places = normed.reshape(-1, grid, grid, patches.shape[-1]).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(places, degree, stride=1, padding=degree // 2)
    return functional.normalize(pooled.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)


def rescore(
    scores: Float64[Tensor, " n"], class_tokens: Float64[Tensor, "n D"], neighbours: Sequence[int]
) -> Float64[Tensor, " n"]:
    """RsCIN: each image's score becomes a weighted mean over the images that are like it as a whole.

    `s'_i = mean over k of (sum_j w_ij s_j) / (sum_j w_ij)`, j over the window of the k images whose class tokens are
    most similar to image i's, itself included and counted; `w_ij = max(0, cos(c_i, c_j))`. k = 1 is the score itself,
    and a window of more images than there are has all of them.

    The public code scales scores to 0..1 over the set first. That is left out: the weights of a window add up to 1, so
    it would change all scores by one and the same rising line, and no order. It lets negative cosines weigh, which one
    category's images do not have; here they weigh nothing, so that the sum of weights is never zero.

    Parameters
    ----------
    scores
        Of each image.
    class_tokens
        Of each image, L2-normalised.
    neighbours
        The k, one at least, each at least 1.
    """
    sizes = torch.tensor([min(k, len(scores)) for k in neighbours])
    widest = int(sizes.max())
    rescored = torch.empty_like(scores)
    for i, token in enumerate(class_tokens):
        similar = class_tokens @ token
        similar[i] = torch.inf  # the image itself is in every window, also where another is its equal
        window = similar.topk(widest).indices
        similar[i] = 1
        weights = similar[window].clamp(min=0)
        means = (weights * scores[window]).cumsum(0) / weights.cumsum(0)
        rescored[i] = means[sizes - 1].mean()
    return rescored


def _class_tokens(category_features: CategoryFeatures) -> Float64[Tensor, "n D"]:
    """One for each image: the mean over its crops, L2-normalised."""
    store = category_features.store
    tokens = torch.stack([store.class_tokens(number).double().mean(0) for number in range(len(store))])
    return functional.normalize(tokens, dim=-1)


def _by_crop(category_features: CategoryFeatures, patches: Float[Tensor, " P"]) -> Float[Tensor, "C g g"]:
    return patches.reshape(-1, category_features.store.grid, category_features.store.grid)
