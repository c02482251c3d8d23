"""Find, identify and describe the weights of a model without loading it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from medad.base.errors import InputError
from medad.base.storage import file_digest, lines_digest
from zsad.config.run import EncoderSettings

EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded" / "weights"
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Names of the weights file in a model's folder (those of open_clip), in order of preference."""


def model_folder(settings: EncoderSettings) -> Path | None:
    """Return the folder of a model that brings its own weights. None for a model of open_clip's list."""
    if settings.model == "embedded":
        return EMBEDDED_FOLDER
    if settings.model.startswith("local-dir:"):
        return Path(settings.model.removeprefix("local-dir:")).expanduser()
    return None


def find_weights(folder: Path) -> Path:
    """Return the weights file in a model's folder. Raises InputError."""
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(folder, f"contains no weights; expected {WEIGHTS_NAMES[0]}")


def weights_digest(settings: EncoderSettings) -> str:
    """Return an identifier of the weights for cache keys: `sha256:...` of local files, else `tag:...` or `seed:...`.

    A tag always names the same weights, so its file is not read.

    Raises
    ------
    InputError
        A local file or folder is missing or cannot be read.
    """
    folder = model_folder(settings)
    if folder is not None:
        files = (folder / CONFIG_NAME, find_weights(folder))
        return f"sha256:{lines_digest(map(file_digest, files))}"
    if settings.weights is not None:
        return f"sha256:{file_digest(Path(settings.weights).expanduser())}"
    return f"seed:{settings.seed}" if settings.tag is None else f"tag:{settings.tag}"


def path_digest(path: Path) -> str:
    """Return an identifier `sha256:...` of a model's file or folder for cache keys.

    It depends on the files' contents and their names in the folder, but not on the folder's own path.

    Raises
    ------
    InputError
        The path does not exist or cannot be read.
    """
    if not path.is_dir():
        return f"sha256:{file_digest(path)}"
    files = sorted(file for file in path.rglob("*") if file.is_file())
    named = (f"{file.relative_to(path).as_posix()} {file_digest(file)}" for file in files)
    return f"sha256:{lines_digest(named)}"


def is_embedded(settings: EncoderSettings, weights: str | None) -> bool:
    """Return whether the settings name the embedded model, or `weights` (`sha256:...`) is the digest of its file."""
    if settings.model == "embedded":
        return True
    return weights is not None and weights == f"sha256:{file_digest(find_weights(EMBEDDED_FOLDER))}"


class EncoderInfo(BaseModel):
    """Facts about the encoder of a result that reports show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    random_weights: bool
    embedded: bool


def encoder_info(settings: EncoderSettings, weights: str) -> EncoderInfo:
    """Return the facts about an encoder for reports. `weights` is the sha256 of its weights file."""
    return EncoderInfo(
        description=describe_encoder(settings),
        random_weights=settings.seed is not None,
        embedded=is_embedded(settings, f"sha256:{weights}"),
    )


def describe_encoder(settings: EncoderSettings) -> str:
    """Describe a model in words for reports, without its path, which may contain a person's name."""
    folder = model_folder(settings)
    if settings.model == "embedded":
        return "embedded: the small model of this product, not CLIP"
    if folder is not None:
        return f"the model in folder {folder.name}"
    if settings.weights is not None:
        return f"{settings.model}, weights from {Path(settings.weights).name}"
    if settings.tag is not None:
        return f"{settings.model}, {settings.tag}"
    return f"{settings.model}, RANDOM weights of seed {settings.seed}"
