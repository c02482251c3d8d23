"""Medical anomaly detection: liver tumours in CT, learned without any tumour label.

`medad.segment` is the main function. It takes a scan and returns a `Segmentation`. Without a liver mask it finds the
liver, and without a trained model it uses the one in the package.
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
