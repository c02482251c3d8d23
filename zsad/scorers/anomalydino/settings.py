"""Settings of AnomalyDINO."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import NotNegative
from zsad.config.system_base import Blocks, SystemSettings, block_outputs


class AnomalyDino(SystemSettings):
    """AnomalyDINO (Damm et al., WACV 2025): each patch is compared with a memory of patches of normal images.

    It needs normal images, but no text and no training. Any encoder serves; the paper's is DINOv2.
    """

    title: ClassVar[str] = "AnomalyDINO"
    source: ClassVar[str] = "Damm et al., AnomalyDINO (WACV 2025)"
    published: ClassVar[str] = (
        "DINOv2 ViT-S/14, shorter side 448 px, last block, 1 to 16 shots, 8 turns, masked background of objects"
    )
    system: Literal["anomalydino"] = "anomalydino"
    """Name of the system."""
    shots: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of normal images in the memory, chosen by the seed from the category's training images. Published: 1 to
    16."""
    turns: Annotated[int, Field(ge=1, le=360)] = 1
    """Number of copies of each normal image in the memory, turned by equal steps of a full circle. 1: the image alone.
    Published for objects that lie in any direction: 8."""
    blocks: Blocks | Literal["last"] | None = None
    """Blocks of the image tower that supply the patches, counted from 1. The distances of several blocks are averaged.
    `last`: the last block after its LayerNorm, as published. None: the encoder's output `patches`."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of an image's patches, those with the largest distances, over which its score is averaged. At least one
    patch is used."""
    subtract_median: bool = False
    """Subtraction of the median of an image's distances before its score is computed. It removes what all patches of an
    image have in common, such as another illumination. Not published."""
    cosines: Literal["fp32", "bf16"] = "fp32"
    """Number format of the products of patches. `bf16` is several times as fast on processors with such instructions,
    and changes distances by less than 0.002."""
    mask_background: bool = False
    """Exclusion of the background: its patches have the distance 0. Published for objects, not for surfaces."""
    mask_threshold: NotNegative = 0.0
    """Value of the first principal component from which a patch is foreground. Published for DINOv2 and blocks `last`:
    10. 0 suits every encoder: the component's sign decides."""

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.blocks is None:
            return (PATCHES,)
        return ("tokens",) if self.blocks == "last" else block_outputs(self.blocks)

    @property
    def reads_class_tokens(self) -> bool:
        return False

    @property
    def turn_count(self) -> int:
        return self.turns
