"""Settings that choose one CT series of a DICOM export."""

from __future__ import annotations

import fnmatch
from typing import Annotated

from pydantic import Field, model_validator

from medad.base.settings import Settings


class SeriesSettings(Settings):
    """The rule for a DICOM folder with several CT series. A series must fit all given values.

    `description` and `kernel` are texts that occur in the header's SeriesDescription and ConvolutionKernel, where `*`
    stands for any text. Upper and lower case are equal.
    """

    description: str | None = None
    """Text in the description of the series, such as `portal`."""
    kernel: str | None = None
    """Text in the name of the reconstruction kernel, such as `B30` or `soft`."""
    thickness_mm: tuple[float, float] | None = None
    """Range of the distance between slices, in mm."""
    number: Annotated[int, Field(ge=0)] | None = None
    """Number of the series."""

    @model_validator(mode="after")
    def _something(self) -> SeriesSettings:
        if self == type(self).model_construct():
            raise ValueError("`series` needs a description, kernel, thickness_mm or number")
        if self.thickness_mm is not None and not 0 <= self.thickness_mm[0] <= self.thickness_mm[1]:
            raise ValueError("thickness_mm must be (low, high) with 0 <= low <= high")
        return self

    def fits(self, description: str, kernel: str, thickness_mm: float | None, number: str) -> bool:
        """Return whether a series with these values fits."""
        for pattern, text in ((self.description, description), (self.kernel, kernel)):
            if pattern is not None and not fnmatch.fnmatchcase(text.casefold(), f"*{pattern.casefold()}*"):
                return False
        if self.thickness_mm is not None:
            low, high = self.thickness_mm
            if thickness_mm is None or not low <= thickness_mm <= high:
                return False
        return self.number is None or number == str(self.number)
