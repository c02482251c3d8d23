"""What many tests of `zsad` read and none changes: a tiny encoder, and auxiliary sets to learn from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from open_clip import factory

from tests.zsad.learned_sets import encoder_settings, make_source
from zsad.config.run import EncoderSettings
from zsad.steps.results import Source


@pytest.fixture(scope="session", autouse=True)
def _vocabulary_read_once() -> Iterator[None]:
    """open_clip reads CLIP's vocabulary of 49,408 words for each model that is loaded."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(factory, "SimpleTokenizer", functools.cache(factory.SimpleTokenizer))
        yield


@pytest.fixture(scope="session")
def learned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny CLIP that learned systems are trained with."""
    folder = tmp_path_factory.mktemp("learned-model") / "tiny"
    encoder_settings(folder)
    return folder


@pytest.fixture(scope="session")
def learned_encoder(learned_model: Path) -> EncoderSettings:
    return encoder_settings(learned_model)


@pytest.fixture(scope="session")
def sources(learned_encoder: EncoderSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source[Path], ...]:
    """Two auxiliary categories: metal_nut and bolt."""
    root = tmp_path_factory.mktemp("auxiliary")
    return make_source(root, "metal_nut", learned_encoder), make_source(root, "bolt", learned_encoder)
