"""Fixtures shared by the tests of `zsad`: a tiny encoder and auxiliary sets for training. No test changes them."""

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
    """Read CLIP's vocabulary of 49,408 words once. open_clip reads it for each loaded model."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(factory, "SimpleTokenizer", functools.cache(factory.SimpleTokenizer))
        yield


@pytest.fixture(scope="session")
def learned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny CLIP with which learned systems are trained."""
    folder = tmp_path_factory.mktemp("learned-model") / "tiny"
    encoder_settings(folder)
    return folder


@pytest.fixture(scope="session")
def learned_encoder(learned_model: Path) -> EncoderSettings:
    return encoder_settings(learned_model)


@pytest.fixture(scope="session")
def sources(learned_encoder: EncoderSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source[Path], ...]:
    """Return two auxiliary categories: metal_nut and bolt."""
    root = tmp_path_factory.mktemp("auxiliary")
    return make_source(root, "metal_nut", learned_encoder), make_source(root, "bolt", learned_encoder)
