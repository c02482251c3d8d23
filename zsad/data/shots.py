"""Choose the normal images of few-shot systems by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def draw_shots(digests: Iterable[str], seed: int, count: int) -> tuple[str, ...]:
    """Choose `count` of the distinct digests at random by the seed, or all of them if there are fewer.

    The result does not depend on the order of `digests`. A larger count adds to the choice of a smaller one.
    """
    ordered = sorted(set(digests), key=lambda digest: hashlib.sha256(f"shots {seed} {digest}".encode()).digest())
    return tuple(ordered[:count])
