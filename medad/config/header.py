"""Settings for reading the geometry in the headers of scans and labels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medad.base.settings import Settings

_Millimetres = Annotated[float, Field(gt=0)]


class HeaderSettings(Settings):
    """Reactions to headers of scans and labels that are incomplete or that differ."""

    affine_mismatch: Literal["error", "warn"] = "error"
    """Reaction to a label with the scan's shape but a different affine (LiTS 28 to 47 have identity affines).
    `error`: the case fails. `warn`: voxels are matched by their index."""
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    """NIfTI affine to use. `agree`: a file with different sform and qform is refused."""
    spacing_mm: tuple[_Millimetres, _Millimetres, _Millimetres] | None = None
    """Voxel size in mm along the three axes of NIfTI files whose affine is missing or the identity. Other files keep
    the size in their header. None: 1 mm for an identity, with a warning; a scan without affine is refused."""
