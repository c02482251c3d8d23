"""Where a model's weights come from, told without loading it."""

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
"""In a model's folder, in order of preference (open_clip's names)."""


def model_folder(settings: EncoderSettings) -> Path | None:
    """The folder of a model that brings its own weights; None for one of open_clip's list."""
    if settings.model == "embedded":
        return EMBEDDED_FOLDER
    if settings.model.startswith("local-dir:"):
        return Path(settings.model.removeprefix("local-dir:")).expanduser()
    return None


def find_weights(folder: Path) -> Path:
    """The weights file of a model's folder. Raises InputError."""
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(folder, f"holds no weights; expected {WEIGHTS_NAMES[0]}")


def weights_digest(settings: EncoderSettings) -> str:
    """What identifies the weights, for cache keys: `sha256:...` of local files, else `tag:...` or `seed:...`.

    A tag is taken at its word, since it names the same weights wherever they are downloaded.

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
    """What identifies a model given by its path, for cache keys: `sha256:...` of a file, or of a folder's files.

    Files count by content and by their name within the folder; where the folder lies and what it is called does not.

    Raises
    ------
    InputError
        Nothing is there, or it cannot be read.
    """
    if not path.is_dir():
        return f"sha256:{file_digest(path)}"
    files = sorted(file for file in path.rglob("*") if file.is_file())
    named = (f"{file.relative_to(path).as_posix()} {file_digest(file)}" for file in files)
    return f"sha256:{lines_digest(named)}"


def is_embedded(settings: EncoderSettings, weights: str | None) -> bool:
    """Whether the embedded model is meant, or features come from its weights (`sha256:...`), wherever they lay."""
    if settings.model == "embedded":
        return True
    return weights is not None and weights == f"sha256:{file_digest(find_weights(EMBEDDED_FOLDER))}"


class EncoderInfo(BaseModel):
    """What reports say of the encoder that made a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    random_weights: bool
    embedded: bool


def encoder_info(settings: EncoderSettings, weights: str) -> EncoderInfo:
    """Return what reports say of an encoder whose weights file has the sha256 `weights`."""
    return EncoderInfo(
        description=describe_encoder(settings),
        random_weights=settings.seed is not None,
        embedded=is_embedded(settings, f"sha256:{weights}"),
    )


def describe_encoder(settings: EncoderSettings) -> str:
    """The model in words for reports; no folder names, since a path may hold a person's."""
    folder = model_folder(settings)
    if settings.model == "embedded":
        return "embedded: the product's own small model, no CLIP"
    if folder is not None:
        return f"the model in folder {folder.name}"
    if settings.weights is not None:
        return f"{settings.model}, weights from {Path(settings.weights).name}"
    if settings.tag is not None:
        return f"{settings.model}, {settings.tag}"
    return f"{settings.model}, RANDOM weights of seed {settings.seed}"
