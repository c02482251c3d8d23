"""Zero- and few-shot anomaly detection in industrial images, which needs no training on the objects to inspect.

Start with `zsad.score`: it takes images and returns an `ImageScore` with an anomaly map for each.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsad.scoring import ImageScore, score

__all__ = ["ImageScore", "score"]


def __getattr__(name: str) -> Any:
    """Import `zsad.scoring` on first use, so that `import zsad` loads neither numpy nor torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zsad import scoring

    return getattr(scoring, name)
