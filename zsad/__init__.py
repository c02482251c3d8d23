"""Industrial zero-shot anomaly detection: images are scored without training on them.

`zsad.score` is the front door: images go in, an `ImageScore` with a map comes out for each.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsad.scoring import ImageScore, score

__all__ = ["ImageScore", "score"]


def __getattr__(name: str) -> Any:
    """Load the front door when it is first used, so that `import zsad` loads neither numpy nor torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zsad import scoring

    return getattr(scoring, name)
