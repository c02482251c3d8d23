"""Medical anomaly detection: liver tumours in CT, learned without any tumour label.

`medad.segment` is the main function. It takes a scan, its liver mask and a trained model, and returns a `Segmentation`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medad.segmentation import Segmentation, segment

__all__ = ["Segmentation", "segment"]


def __getattr__(name: str) -> Any:
    """Load `medad.segmentation` when it is first used, so that `import medad` loads neither numpy nor torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medad import segmentation

    return getattr(segmentation, name)
