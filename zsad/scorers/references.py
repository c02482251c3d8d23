"""Choice of the reference images with which each image of a category is compared (dual-image paper, figure 5a)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64
from numpy import ndarray


def draw_references(digests: Sequence[str], seed: int, count: int) -> Int64[ndarray, "n k"]:
    """Return for each image the rows of `count` random other images. If there are fewer, return all others.

    The choice depends on the seed and on the contents of the images, not on their order. A larger count adds to the
    references of a smaller one. Files of equal content count as one image. They have the same references, and none is
    a reference of another.

    Each pair of images has a random number, and an image takes the others with the largest numbers (rendezvous
    hashing). So one more image among n becomes a reference of about `count` others, and no other choice changes.

    Parameters
    ----------
    digests
        sha256 of each image, by row.
    seed
        Seed of the choice.
    count
        Number of references per image, k of figure 5a.
    """
    first_row = {digest: row for row, digest in reversed(list(enumerate(digests)))}
    distinct = sorted(first_row)
    k = min(count, max(len(distinct) - 1, 0))
    rows = np.array([first_row[digest] for digest in distinct], dtype=np.int64)
    keys = np.array([_key(f"{digest}") for digest in distinct], dtype=np.uint64)
    queries = np.array([_key(f"references {seed} {digest}") for digest in distinct], dtype=np.uint64)
    chosen: dict[str, Int64[ndarray, " k"]] = {}
    for number, digest in enumerate(distinct):
        order = np.argsort(_mix(keys ^ queries[number]), kind="stable")[::-1]
        chosen[digest] = rows[order[order != number][:k]]
    return np.array([chosen[digest] for digest in digests], dtype=np.int64).reshape(len(digests), k)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _mix(values: UInt64[ndarray, " n"]) -> UInt64[ndarray, " n"]:
    """Return 64 random-looking bits for each value: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[ndarray, " n"] = values ^ (values >> np.uint64(31))
    return mixed
