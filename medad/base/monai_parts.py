"""The parts of MONAI that this product uses: blocks, networks, a loss and the sliding window.

`import monai` loads all of MONAI, and every optional library that MONAI finds installed. Those take most of the time of
the import, and these parts use none of them. This module hides them from MONAI. Import it only where a network is
built, trained or used.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPTIONAL = frozenset(
    {
        "huggingface_hub",
        "ignite",
        "matplotlib",
        "mlflow",
        "nibabel",
        "nvidia",
        "pandas",
        "PIL",
        "pydicom",
        "skimage",
        "sklearn",
        "tensorboard",
        "tensorboardX",
        "tifffile",
        "torchvision",
        "transformers",
    }
)
"""Packages that MONAI imports if it finds them. Only networks and transforms that are not used here need them."""


class _HidingFinder(MetaPathFinder):
    """A finder that raises for some packages in the thread that created it, as if they were not installed."""

    def __init__(self, packages: frozenset[str]) -> None:
        self.packages, self.thread = packages, threading.get_ident()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if threading.get_ident() == self.thread and fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"{fullname} is hidden", name=fullname)
        return None


@contextlib.contextmanager
def hidden(packages: frozenset[str]) -> Iterator[None]:
    """Hide packages from the imports of this thread inside the `with` block. Loaded packages stay visible."""
    finder = _HidingFinder(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


with hidden(OPTIONAL):
    from monai.inferers import sliding_window_inference
    from monai.losses.ssim_loss import SSIMLoss
    from monai.networks import nets
    from monai.networks.blocks.activation import Swish
    from monai.networks.blocks.convolutions import Convolution
    from monai.networks.blocks.upsample import UpSample
    from monai.networks.nets import DynUNet

__all__ = ["Convolution", "DynUNet", "SSIMLoss", "Swish", "UpSample", "nets", "sliding_window_inference"]
