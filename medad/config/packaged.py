"""Models in the package: `default` names the model that `adflows liver segment` uses if no other is given."""

from __future__ import annotations

import re
from pathlib import Path

from medad.base.errors import ConfigError
from medad.base.manifest import MANIFEST

DEFAULT_MODEL = "default"
MODELS = Path(__file__).parents[1] / "models"
"""Folder of the models in the package, each with the layout of a run folder."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def model_folder(model: str | Path | None = None) -> Path:
    """Return the folder of a model: a run folder, or a model in the package by its name.

    An existing folder is preferred to a name. None means `default`. Other texts are returned as paths, and the reader
    of the model reports that they are not a run folder.

    Raises
    ------
    ConfigError
        The name is `default`, but the package does not contain this model.
    """
    text = DEFAULT_MODEL if model is None else str(model)
    folder = Path(text).expanduser()
    if model is not None and folder.is_dir():
        return folder
    packaged = MODELS / text
    if _NAME.fullmatch(text) and (packaged / MANIFEST).is_file():
        return packaged
    if text == DEFAULT_MODEL:
        raise ConfigError(
            "the package contains no model `default`; name the run folder of a trained model, such as the one that "
            "`adflows liver train default --train FOLDER` writes to runs/liver/default"
        )
    return folder
