"""The mutual scoring mechanism of MuSc (Li et al., ICLR 2024): the images of a set score one another, patch by patch.

Patches are L2-normalised, so that ||a - b|| = sqrt(2 - 2 cos), and the product of two images' patches tells both how
far the first image's are from the second (the largest cosine of each row) and the reverse (of each column). Cosines are
float32: a distance below 1e-3 is rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

COSINES_BYTES = 1 << 31
"""Largest cosines held at a time, at most: those of the images that are being scored to all others."""
PIECE_PATCHES = 1 << 12
"""Of an image, multiplied at a time, at most: a product holds 64 MiB, however many crops images have."""

Operand = tuple[Tensor, ...]
"""An image's patches in pieces, ready to be multiplied."""
ReadPatches = Callable[[int], Float[Tensor, "P D"]]


def operand(patches: Float[Tensor, "P D"]) -> Operand:
    """The patches of one image for `largest_cosines`."""
    pieces = torch.split(patches, PIECE_PATCHES)
    # oneDNN took half the time of torch's own product (MKL) on an AMD processor
    in_one_dnn = patches.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return tuple(piece.to_mkldnn() for piece in pieces) if in_one_dnn else pieces


def largest_cosines(first: Operand, second: Operand) -> tuple[Float[Tensor, " P"], Float[Tensor, " Q"]]:
    """For each patch of the first image the largest cosine to one of the second, and the reverse, by one product."""
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for piece in first:
        products = [_product(piece, other) for other in second]
        rows.append(torch.stack([product.amax(1) for product in products]).amax(0))
        found = [product.amax(0) for product in products]
        columns = [torch.maximum(*both) for both in zip(columns, found, strict=True)] if columns else found
    return torch.cat(rows), torch.cat(columns)


def _product(first: Tensor, second: Tensor) -> Tensor:
    product = functional.linear(first, second)
    return product.to_dense() if product.is_mkldnn else product


def lowest_mean(cosines: Float[Tensor, "M P"], share: float) -> Float[Tensor, " P"]:
    """Interval average: the mean of the lowest `share` of each patch's distances to M images, 0..2.

    floor(share M) distances are averaged, and where that is none (M < 4 by the published 0.3), the lowest alone.

    Parameters
    ----------
    cosines
        Largest cosine of each patch to each image.
    share
        0 to 1, above 0.
    """
    count = max(1, int(share * len(cosines)))
    lowest = (2 - 2 * cosines.topk(count, dim=0).values).clamp(min=0).sqrt()
    return lowest.mean(0)


def mutual_scores(
    read: ReadPatches, sizes: Sequence[int], share: float, batch_size: int, device: torch.device
) -> Iterator[tuple[int, Float[Tensor, " P"]]]:
    """Score every image of a set by all others: its number and its patches' scores, 0..2, higher is more anomalous.

    For patch p of image i, `a(j) = min over patches q of image j of ||p - q||` for each j other than i; the score is
    the mean of the lowest `share` of these. Each unordered pair of images is multiplied once.

    Memory: two batches of patches, one product, and for each image being scored one largest cosine a patch and image
    of the set: 4 N bytes a patch. Where those of all images would take more than `COSINES_BYTES`, as many batches as do
    not are scored at a time (one at least), and only pairs of which both are scored at once are still multiplied once.

    Parameters
    ----------
    read
        Patches of an image by its number, L2-normalised, on `device`. Called N / (2 batch_size) times for each image.
    sizes
        Patches of each image; two images at least.
    share
        Of the distances to other images that are averaged, see `lowest_mean`.
    batch_size
        Images whose patches are held at a time, twice. It changes no score but by rounding.
    device
        Of what is returned.
    """
    count = len(sizes)
    if count < 2:
        raise ValueError(f"{count} images cannot score one another")
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for scored in _batches_in_memory(batches, sizes):
        cosines = {i: torch.empty(count - 1, sizes[i], device=device) for b in scored for i in batches[b]}
        for i, j, first, second in _pairs(read, batches, scored):
            to_second, to_first = largest_cosines(first, second)
            # an image has no row for itself
            if i in cosines:
                cosines[i][j - 1] = to_second
            if j in cosines:
                cosines[j][i] = to_first
        for i in list(cosines):
            yield i, lowest_mean(cosines.pop(i), share)


def _batches_in_memory(batches: Sequence[range], sizes: Sequence[int]) -> Iterator[range]:
    """Runs of batches, by number, whose largest cosines fit in memory."""
    start, held = 0, 0
    for number, batch in enumerate(batches):
        needed = 4 * len(sizes) * sum(sizes[i] for i in batch)
        if number > start and held + needed > COSINES_BYTES:
            yield range(start, number)
            start, held = number, 0
        held += needed
    yield range(start, len(batches))


def _pairs(read: ReadPatches, batches: Sequence[range], scored: range) -> Iterator[tuple[int, int, Operand, Operand]]:
    """All pairs i < j of images of which one at least is in a scored batch, batch by batch."""
    for a, batch in enumerate(batches):
        partners = range(a if a in scored else max(a, scored.start), len(batches) if a in scored else scored.stop)
        if not partners:
            continue
        firsts = [operand(read(i)) for i in batch]
        for b in partners:
            yield from _pairs_of_batches(read, batch, firsts, batches[b])


def _pairs_of_batches(
    read: ReadPatches, batch: range, firsts: Sequence[Operand], others: range
) -> Iterator[tuple[int, int, Operand, Operand]]:
    """The pairs i < j of two batches, or of one. A function, so that the second's patches go before others come."""
    seconds = firsts if others == batch else [operand(read(j)) for j in others]
    for i, first in zip(batch, firsts, strict=True):
        for j, second in zip(others, seconds, strict=True):
            if i < j:
                yield i, j, first, second
