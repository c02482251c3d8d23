"""Settings of the method of segmentation models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from medad.base.private import ModelFile
from zsad.config.run import NotNegative, Positive
from zsad.config.system_base import SystemSettings


class SegmentationModels(SystemSettings):
    """Method of the segmentation-model paper (Baugh et al., 2023), built from pretrained segmentation models.

    SAM and a salient-object model find the foreground, which is cut into tiles. CLIP scores each tile, and CLIPSeg
    scores its pixels.
    """

    title: ClassVar[str] = "Segmentation models"
    source: ClassVar[str] = "Baugh et al., Zero-Shot AD with Pre-trained Segmentation Models (VAND challenge 2023)"
    published: ClassVar[str] = "CLIP, CLIPSeg, SAM and a dichotomous segmentation model; VisA"
    system: Literal["segmentation"] = "segmentation"
    """Name of the system."""
    clipseg: ModelFile | None = None
    """Folder of a CLIPSeg model in the format of the library transformers."""
    sam: ModelFile | None = None
    """Folder of a SAM model in the format of the library transformers."""
    sam_points_per_side: Annotated[int, Field(ge=1, le=256)] = 32
    """Number of points per side of the grid of points that prompt SAM. The default is SAM's own."""
    sam_min_iou: NotNegative = 0.88
    """Smallest IoU that SAM must predict for a mask to be used. The default is SAM's own. 0: all masks are used."""
    sam_min_stability: NotNegative = 0.95
    """Smallest stability score of a SAM mask to be used. The default is SAM's own. 0: all masks are used."""
    sam_max_box_iou: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Largest IoU of the bounding boxes of two masks. Above it, one of them is dropped. The default is SAM's own."""
    salient: ModelFile | None = None
    """TorchScript file of a salient-object (dichotomous) segmentation model. It maps an image with values 0 to 1 to one
    channel."""
    trust_salient: bool = False
    """Permission to load the file of `salient`. A TorchScript file is a program, which runs when it is loaded."""
    salient_px: Annotated[int, Field(ge=32, le=4096)] = 1024
    """Side of the square input of the salient-object model."""
    salient_output: Literal["probability", "logits"] = "probability"
    """Meaning of the salient-object model's output values."""
    foreground_px: Annotated[int, Field(ge=32, le=8192)] = 1024
    """Longest side to which an image is resized before the foreground is found. The default is SAM's input size."""
    covered: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Smallest share of a SAM segment that must lie in the salient object for the segment to be foreground."""
    tile_px: Annotated[int, Field(ge=16, le=4096)] = 352
    """Smallest side of a tile. The default is CLIPSeg's input size."""
    long_aspect: Annotated[float, Field(gt=1)] = 1.5
    """Smallest aspect ratio of a foreground component that is treated as long."""
    many_parts: Annotated[int, Field(ge=1)] = 20
    """Number of SAM segments above which a long component is cut into tiles along its length."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the foreground components, those with the highest scores, over which the image's score is averaged."""
    tau: Positive = 0.07
    """Temperature of the softmax over normal and anomalous prompts."""

    @model_validator(mode="after")
    def _trusts_its_program(self) -> SegmentationModels:
        if self.salient is not None and not self.trust_salient:
            rule = "`salient` is a TorchScript file, a program, which runs when it is loaded"
            raise ValueError(f"{rule}; if you trust whoever made it, set `trust_salient: true`")
        return self

    @property
    def loads_encoder(self) -> bool:
        return True

    @property
    def prompts(self) -> None:
        return None
