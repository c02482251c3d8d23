"""Normal images for few-shot systems, drawn by their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def draw_shots(digests: Iterable[str], seed: int, count: int) -> tuple[str, ...]:
    """Draw `count` of the distinct contents by the seed, or all of them where there are fewer.

    A larger count keeps the contents of a smaller one and adds to them. The order of `digests` changes nothing.
    """
    ordered = sorted(set(digests), key=lambda digest: hashlib.sha256(f"shots {seed} {digest}".encode()).digest())
    return tuple(ordered[:count])
