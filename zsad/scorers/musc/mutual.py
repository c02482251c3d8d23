"""The mutual scoring mechanism of MuSc (Li et al., ICLR 2024): the images of a set score one another, patch by patch.

Patches are L2-normalised, so ||a - b|| = sqrt(2 - 2 cos). Cosines are float32, so distances below 1e-3 are rounding
errors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from zsad.scorers.cosines import Operand, largest_cosines, operand

COSINES_BYTES = 1 << 31
"""Limit for the cosines in memory at a time, bytes. They belong to the images being scored."""
ReadPatches = Callable[[int], Float[Tensor, "P D"]]


def lowest_mean(cosines: Float[Tensor, "M P"], share: float) -> Float[Tensor, " P"]:
    """Return the interval average: the mean of the lowest `share` of each patch's distances to M images, 0..2.

    floor(share M) distances are averaged, but at least one. With the published share 0.3, M < 4 gives one.

    Parameters
    ----------
    cosines
        Largest cosine of each patch to each image.
    share
        Share of the distances, above 0 and at most 1.
    """
    count = max(1, int(share * len(cosines)))
    lowest = (2 - 2 * cosines.topk(count, dim=0).values).clamp(min=0).sqrt()
    return lowest.mean(0)


def circle_scores(
    read: ReadPatches,
    order: Sequence[int],
    partners: int,
    share: float,
    *,
    bf16: bool = False,
    on_pair: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Float[Tensor, " P"]]]:
    """Score every image of a set by its neighbours in a circle: `partners` / 2 before it and as many after it.

    The scores are those of `mutual_scores` with these images instead of all others. Each pair is multiplied once. One
    more image in the circle changes one partner of each of its `partners` neighbours, and no other.
    Memory contains the patches of `partners` images and their cosines, for any number of images.

    Parameters
    ----------
    order
        Numbers of the images in the circle; more than `partners`.
    partners
        Number of neighbours, at least 2; an odd number is rounded down.
    on_pair
        Function called after each of `len(order) * (partners // 2)` pairs.
    """
    half, count = partners // 2, len(order)
    if not 2 <= 2 * half < count:
        raise ValueError(f"{partners} partners in a circle of {count} images")
    operands: dict[int, Operand] = {}
    cosines: dict[int, list[Tensor]] = defaultdict(list)

    def operand_at(place: int) -> Operand:
        if place not in operands:
            operands[place] = operand(read(order[place]), bf16=bf16)
        return operands[place]

    for place in range(count):
        for step in range(1, half + 1):
            other = (place + step) % count
            to_second, to_first = largest_cosines(operand_at(place), operand_at(other))
            cosines[place].append(to_second)
            cosines[other].append(to_first)
            on_pair()
        if place >= half:  # the first ones are needed again where the circle closes
            del operands[place]
        for ready in [one for one, found in cosines.items() if len(found) == 2 * half]:
            yield order[ready], lowest_mean(torch.stack(cosines.pop(ready)), share)


def mutual_scores(
    read: ReadPatches,
    sizes: Sequence[int],
    share: float,
    batch_size: int,
    device: torch.device,
    *,
    bf16: bool = False,
    on_pair: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Float[Tensor, " P"]]]:
    """Score every image of a set by all others.

    Yield each image's number with the scores of its patches, 0..2; higher is more anomalous.
    For patch p of image i, `a(j) = min over patches q of image j of ||p - q||` for each j other than i.
    The score of p is the mean of the lowest `share` of these values. Each unordered pair of images is multiplied once.

    Memory contains two batches of patches, one product, and one cosine per patch and other image: 4 N bytes per patch.
    If the cosines of all images need more than `COSINES_BYTES`, only some batches are scored at a time, at least one.
    Then a pair is multiplied once only if both its images are scored at the same time.

    Parameters
    ----------
    read
        Function from an image's number to its patches, L2-normalised, on `device`.
        It is called N / (2 batch_size) times per image.
    sizes
        Number of patches of each image; at least two images.
    share
        Share of the distances that is averaged; see `lowest_mean`.
    batch_size
        Number of images per batch. Two batches are in memory at a time. It changes scores only by rounding.
    device
        Device of the returned scores.
    bf16
        Whether products are computed in bf16; see `operand`.
    on_pair
        Function called after each product. There are N (N - 1) / 2 if all cosines fit in memory, else more.
    """

    def prepare(number: int) -> Operand:
        return operand(read(number), bf16=bf16)

    count = len(sizes)
    if count < 2:
        raise ValueError(f"{count} images cannot score one another")
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for scored in _batches_in_memory(batches, sizes):
        cosines = {i: torch.empty(count - 1, sizes[i], device=device) for b in scored for i in batches[b]}
        for i, j, first, second in _pairs(prepare, batches, scored):
            to_second, to_first = largest_cosines(first, second)
            on_pair()
            # an image is not compared with itself, so later images move up one row
            if i in cosines:
                cosines[i][j - 1] = to_second
            if j in cosines:
                cosines[j][i] = to_first
        for i in list(cosines):
            yield i, lowest_mean(cosines.pop(i), share)


def _batches_in_memory(batches: Sequence[range], sizes: Sequence[int]) -> Iterator[range]:
    """Yield ranges of batch numbers. The cosines of each range fit in memory."""
    start, held = 0, 0
    for number, batch in enumerate(batches):
        needed = 4 * len(sizes) * sum(sizes[i] for i in batch)
        if number > start and held + needed > COSINES_BYTES:
            yield range(start, number)
            start, held = number, 0
        held += needed
    yield range(start, len(batches))


def _pairs(
    prepare: Callable[[int], Operand], batches: Sequence[range], scored: range
) -> Iterator[tuple[int, int, Operand, Operand]]:
    """Yield all pairs i < j of images with at least one image in a scored batch, batch by batch."""
    for a, batch in enumerate(batches):
        partners = range(a if a in scored else max(a, scored.start), len(batches) if a in scored else scored.stop)
        if not partners:
            continue
        firsts = [prepare(i) for i in batch]
        for b in partners:
            yield from _pairs_of_batches(prepare, batch, firsts, batches[b])


def _pairs_of_batches(
    prepare: Callable[[int], Operand], batch: range, firsts: Sequence[Operand], others: range
) -> Iterator[tuple[int, int, Operand, Operand]]:
    """Yield the pairs i < j of two batches, or of one batch.

    This is a separate function so that the second batch's patches are freed before the next are read.
    """
    seconds = firsts if others == batch else [prepare(j) for j in others]
    for i, first in zip(batch, firsts, strict=True):
        for j, second in zip(others, seconds, strict=True):
            if i < j:
                yield i, j, first, second
