"""Fixture of scored categories, each written once for all tests that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.zsad.scored_sets import ExampleImage, write_category, zsad_settings
from zsad.config.settings import ZsadSettings
from zsad.steps.results import CategoryResult


@pytest.fixture(scope="session")
def category(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CategoryResult[Path]]:
    """Write a category with `write_category`, or return an equal one. Tests must not change its files."""
    written: dict[str, CategoryResult[Path]] = {}

    def make(
        name: str, images: Sequence[ExampleImage], settings: ZsadSettings | None = None, **options: Any
    ) -> CategoryResult[Path]:
        settings = settings or zsad_settings()
        shift = options.get("shift", lambda seed: 0.0)
        shifts = [(seed, shift(seed)) for seed in settings.seeds]
        others = {key: value for key, value in options.items() if key != "shift"}
        key = repr((images, settings.method, settings.evaluation, shifts, others))
        if key not in written:
            written[key] = write_category(tmp_path_factory.mktemp("category"), "made", images, settings, **options)
        return dataclasses.replace(written[key], name=name)

    return make
