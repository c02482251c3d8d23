"""Find the file of a model's weights: on this machine, or by one download of a tag."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

from medad.base.errors import ConfigError
from zsad.clip.models import find_weights, hub_file, imported_file, model_folder
from zsad.config.run import EncoderSettings

_HUB_SECONDS = 10


def weights_file(settings: EncoderSettings, name: str) -> Path:
    """Return the local file of a CLIP's weights. `name` is the model's name in open_clip.

    A tag is downloaded only if it was neither imported nor is in the hub's cache.

    Raises
    ------
    ConfigError
        A tag is not on this machine and cannot be downloaded.
    """
    folder = model_folder(settings)
    if folder is not None:
        return find_weights(folder)
    if settings.weights is not None:
        return Path(settings.weights).expanduser()
    assert settings.tag is not None
    return imported_file(name, settings.tag) or tag_file(name, settings.tag, "set encoder.weights to a local file")


_failed: dict[tuple[str, str], str] = {}
"""Reason of each download that failed in this process. It is not tried again."""


def tag_file(name: str, tag: str, advice: str) -> Path:
    """Return the file of a tag in the hub's cache, or download it once and quietly. `advice` ends the error.

    Raises
    ------
    ConfigError
        The download failed, now or earlier in this process.
    """
    config = open_clip.get_pretrained_cfg(name, tag)
    if cached := hub_file(config.get("hf_hub", "")):
        return cached
    if (name, tag) not in _failed:
        try:
            return _download(config)
        except Exception as error:  # network errors have many types
            cause = error.__cause__ or error
            _failed[name, tag] = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    raise ConfigError(
        f"encoder.tag {tag} of {name} is not in the local cache and cannot be downloaded ({_failed[name, tag]}); "
        f"{advice}"
    )


def _download(config: Mapping[str, Any]) -> Path:
    """Download a tag's file without progress bars. One short request first says whether the hub answers."""
    if config.get("hf_hub"):
        repository, filename = os.path.split(config["hf_hub"])
        _ask_hub(repository, filename)
    bars_were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of a download by address
            return Path(open_clip.download_pretrained(config))
    finally:
        if not bars_were_off:
            enable_progress_bars()


def _ask_hub(repository: str, filename: str) -> None:
    """Raise an error if the hub does not answer. Its client alone would try for 46 seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    for name in (filename,) if filename else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        with contextlib.suppress(EntryNotFoundError):
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name), timeout=_HUB_SECONDS)
            return
