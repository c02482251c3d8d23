"""MuSc (Li et al., ICLR 2024) and MuSc-2. Neither uses text or training.

MuSc compares each image with all others. MuSc-2 compares it only with its reference images. MuSc-2 is a baseline in the
dual-image paper (Zhang et al., Dual-Image Enhanced CLIP, 2024; table 1).
Both read patches of several blocks of the image tower. The parts of the method:

- `aggregate`: local neighbourhood aggregation with multiple degrees (LNAMD);
- `zsad.scorers.musc.mutual`: the mutual scoring mechanism (MSM);
- `rescore`: re-scoring with constrained image-level neighbourhood (RsCIN), for MuSc only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.scorers.cosines import largest_cosines, operand
from zsad.scorers.interface import NO_OTHER_NORMAL, CategoryFeatures, Scored, top_score
from zsad.scorers.musc.mutual import circle_scores, lowest_mean, mutual_scores
from zsad.scorers.musc.settings import MuSc, MuSc2, MutualSettings


def score(category_features: CategoryFeatures, settings: MuSc | MuSc2) -> Iterator[Scored]:
    """Score the images of a category. Scores and maps are distances, 0..2; higher is more anomalous.

    The map of an image is the mean of its patches' scores over blocks and degrees. The image score is the map's
    maximum, or the mean of its top share. MuSc then re-scores it. The patches of all crops of an image count as one
    set.

    MuSc yields all images at the end, because every image is scored by all others. Memory then contains the maps of all
    images, in addition to what `zsad.scorers.musc.mutual.mutual_scores` needs. MuSc-2 yields images one by one.

    With `shots`, images are compared with the normal images instead, and yielded one by one.

    Raises
    ------
    InputError
        Features are missing or damaged, or the category has only one image.
    """
    if settings.shots:
        return _against_normal(category_features, settings)
    if isinstance(settings, MuSc2):
        return _against_references(category_features, settings)
    return _against_all(category_features, settings)


def _against_all(category_features: CategoryFeatures, settings: MuSc) -> Iterator[Scored]:
    store = category_features.store
    sizes = [image.rows * store.grid**2 for image in store.images]
    if len(sizes) == 1:
        raise InputError(
            category_features.paths[0], f"{settings.title} needs at least two different images: it compares them"
        )
    maps = [torch.zeros(size) for size in sizes]
    passes = [(output, degree) for output in settings.outputs for degree in settings.degrees]
    circle = settings.partners is not None and len(sizes) > settings.partners
    each = len(sizes) * (settings.partners // 2 if circle and settings.partners else (len(sizes) - 1) / 2)
    progress = _Progress(category_features.report, len(sizes), each * len(passes))
    for output, degree in passes:
        read = partial(read_patches, category_features.store, category_features.device, output, degree)
        more: dict[str, Any] = {"bf16": settings.cosines == "bf16", "on_pair": progress.count}
        if circle and settings.partners:
            scored = circle_scores(read, _circle(store.digests), settings.partners, settings.share, **more)
        else:
            scored = mutual_scores(
                read, sizes, settings.share, category_features.batch_size, category_features.device, **more
            )
        for number, found in scored:
            maps[number] += found.cpu() / len(passes)
    scores = torch.tensor([_image_score(patches, settings) for patches in maps], dtype=torch.float64)
    if settings.neighbours:
        scores = rescore(scores, _class_tokens(category_features), settings.neighbours)
    for number, patches in enumerate(maps):
        yield Scored(number, float(scores[number]), _by_crop(category_features, patches))


def _image_score(patches: Float[Tensor, " P"], settings: MutualSettings) -> float:
    return top_score(patches, settings.top_share, subtract_median=settings.subtract_median)


def _circle(digests: Sequence[str]) -> list[int]:
    """Return the numbers of the images in a random order that depends only on their contents."""
    ranks = [hashlib.sha256(f"circle {digest}".encode()).digest() for digest in digests]
    return sorted(range(len(ranks)), key=ranks.__getitem__)


@dataclass
class _Progress:
    """Progress in pairs, reported as a number of images."""

    report: Callable[[int], None]
    images: int
    pairs: float
    done: int = 0

    def count(self) -> None:
        before = int(self.images * min(1, self.done / self.pairs))
        self.done += 1
        now = int(self.images * min(1, self.done / self.pairs))
        if now > before:
            self.report(now)


def _against_references(category_features: CategoryFeatures, settings: MuSc2) -> Iterator[Scored]:
    store, device = category_features.store, category_features.device
    for number, references in enumerate(category_features.references.tolist()):
        yield _against(category_features, settings, number, [(store, device, other) for other in references])


def _against_normal(category_features: CategoryFeatures, settings: MutualSettings) -> Iterator[Scored]:
    """Score each image by the normal images, except by itself."""
    normal, device = category_features.shots, category_features.device
    if normal is None or not len(normal):
        raise ValueError(f"{settings.title} needs normal images")
    for number, digest in enumerate(category_features.store.digests):
        others = [(normal, device, other) for other, known in enumerate(normal.digests) if known != digest]
        if others:
            yield _against(category_features, settings, number, others)
        else:
            yield Scored.without_score(number, NO_OTHER_NORMAL)


def _against(
    category_features: CategoryFeatures,
    settings: MutualSettings,
    number: int,
    others: Sequence[tuple[FeatureStore, torch.device, int]],
) -> Scored:
    """Score one image by other images, given by their stores, the device, and their numbers."""
    found, bf16 = [], settings.cosines == "bf16"
    for output in settings.outputs:
        for degree in settings.degrees:
            own = read_patches(category_features.store, category_features.device, output, degree, number)
            query = operand(own, bf16=bf16)
            cosines = [
                largest_cosines(query, operand(read_patches(store, device, output, degree, other), bf16=bf16))[0]
                for store, device, other in others
            ]
            found.append(lowest_mean(torch.stack(cosines), settings.share))
    patches = torch.stack(found).mean(0).cpu()
    return Scored(number, _image_score(patches, settings), _by_crop(category_features, patches))


def read_patches(
    store: FeatureStore, device: torch.device, output: str, degree: int, number: int
) -> Float[Tensor, "P W"]:
    """Return all patches of all crops of one image, aggregated, on the device. Raise InputError."""
    patches = store.output(number, output)[:, 1:].to(device)
    return aggregate(patches, store.grid, degree).flatten(0, 1)


def aggregate(patches: Float[Tensor, "C N W"], grid: int, degree: int) -> Float[Tensor, "C N W"]:
    """Average each patch over its `degree` x `degree` neighbourhood and L2-normalise (LNAMD with one degree).

    First, the tokens of each crop are normalised to mean 0 and variance 1 over channels and positions together:
    LayerNorm over C, H and W without gain or bias, epsilon 1e-5. Outside the map are zeros, as in the public code.
    Whether these zeros count in the average does not matter, because the result is normalised to length 1.

    Parameters
    ----------
    patches
        Tokens of one block, without the class token, row by row.
    grid
        Number of patches per side.
    degree
        Side r of the neighbourhood in patches; odd. 1: no averaging.
    """
    normed = functional.layer_norm(patches, patches.shape[1:])
    places = normed.reshape(-1, grid, grid, patches.shape[-1]).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(places, degree, stride=1, padding=degree // 2)
    return functional.normalize(pooled.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)


def rescore(
    scores: Float64[Tensor, " n"], class_tokens: Float64[Tensor, "n D"], neighbours: Sequence[int]
) -> Float64[Tensor, " n"]:
    """Replace each image's score by a weighted mean over the most similar images (RsCIN).

    `s'_i = mean over k of (sum_j w_ij s_j) / (sum_j w_ij)`, with `w_ij = max(0, cos(c_i, c_j))`. j runs over the k
    images with the class tokens most similar to that of image i. Image i itself is one of the k.
    k = 1 gives the score itself. If k is larger than the number of images, all images are used.

    There are two differences from the public code. It first scales scores to 0..1 over the set. That is left out here:
    the normalised weights add up to 1, so scaling would not change the order of the scores. It also uses negative
    cosines as weights. Here they count as 0, so the sum of the weights is never zero.
    Images of one category have no negative cosines in practice.

    Parameters
    ----------
    scores
        Score of each image.
    class_tokens
        Class token of each image, L2-normalised.
    neighbours
        Values of k: at least one, each at least 1.
    """
    sizes = torch.tensor([min(k, len(scores)) for k in neighbours])
    widest = int(sizes.max())
    rescored = torch.empty_like(scores)
    for i, token in enumerate(class_tokens):
        similar = class_tokens @ token
        similar[i] = torch.inf  # the image itself is in every window, even if another image is equal to it
        window = similar.topk(widest).indices
        similar[i] = 1
        weights = similar[window].clamp(min=0)
        means = (weights * scores[window]).cumsum(0) / weights.cumsum(0)
        rescored[i] = means[sizes - 1].mean()
    return rescored


def _class_tokens(category_features: CategoryFeatures) -> Float64[Tensor, "n D"]:
    """Return one class token per image: the mean over its crops, L2-normalised."""
    store = category_features.store
    tokens = torch.stack([store.class_tokens(number).double().mean(0) for number in range(len(store))])
    return functional.normalize(tokens, dim=-1)


def _by_crop(category_features: CategoryFeatures, patches: Float[Tensor, " P"]) -> Float[Tensor, "C g g"]:
    return patches.reshape(-1, category_features.store.grid, category_features.store.grid)
