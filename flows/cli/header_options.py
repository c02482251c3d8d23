"""Options for headers of scans and masks that are incomplete or that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medad.base.errors import ConfigError

if TYPE_CHECKING:
    from medad.config.header import HeaderSettings

AffineFrom = Annotated[
    Literal["sform", "qform"] | None,
    typer.Option("--affine-from", help="Affine to use if a NIfTI header has two that differ. Default: an error."),
]
AffineMismatch = Annotated[
    Literal["error", "warn"] | None,
    typer.Option(
        "--affine-mismatch", help="For a mask with the scan's shape on another grid: warn matches voxels by index."
    ),
]
SpacingMm = Annotated[
    tuple[float, float, float] | None,
    typer.Option(
        "--spacing-mm",
        metavar="X Y Z",
        help="Voxel size in mm along the file's axes, for a NIfTI file whose affine is missing or the identity.",
    ),
]


def header_settings(
    affine_from: str | None,
    affine_mismatch: str | None,
    spacing_mm: tuple[float, float, float] | None,
    overrides: Mapping[str, Any] | None = None,
) -> HeaderSettings:
    """Return the settings of these options. Values from --set test_data.KEY are used where an option is not given.

    Raises ConfigError.
    """
    from pydantic import ValidationError

    from medad.config.header import HeaderSettings

    options = {"affine_from": affine_from, "affine_mismatch": affine_mismatch, "spacing_mm": spacing_mm}
    values = {}
    for name, value in options.items():
        given = (overrides or {}).get(f"test_data.{name}") if value is None else value
        if given is not None:
            values[name] = given
    try:
        return HeaderSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}: {first['msg']}") from error
