"""The pages that lead through commands do what they say: each of their blocks is run, in order, in one folder.

The folder holds small generated data under the names that the pages use. Commands run as printed, with one exception:
settings are appended that shorten training (`tests.docs.runner.SHORTER`): one epoch, small networks, slices of 64 px.
Where a page names a model of open_clip by its architecture, a tiny one is registered under that name.
Output that a page shows is compared word by word, with figures, keys and identifiers left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from open_clip import factory

from tests.docs.pages import blocks, tested_pages
from tests.docs.runner import Runner, load_configuration
from tests.docs.world import make_samples, make_world
from tests.zsad.tiny_clip import tiny_config

NOT_RUN: dict[tuple[str, str], str] = {}
"""Blocks that no test can run, by page and first line, with the reason."""
SLOW: frozenset[str] = frozenset()
"""Pages that take more than a few seconds."""
WITH_SAMPLES: frozenset[str] = frozenset()
"""Pages that use the sample data of `adflows samples`."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the sample data alone."""
    cache = tmp_path_factory.mktemp("samples")
    make_samples(cache)
    return cache


@pytest.fixture
def work(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A copy of the world as the current folder, with a cache, a register and a Prefect home of its own."""
    folder = tmp_path / "work"
    shutil.copytree(world, folder)
    if request.node.callspec.params["page"] in WITH_SAMPLES:
        shutil.copytree(request.getfixturevalue("samples"), tmp_path / "cache")
    before = dict(os.environ)
    for name in ("cache", "private", "slots", "configs"):
        monkeypatch.setenv(f"ADFLOWS_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("PREFECT_HOME", os.environ.get("PREFECT_HOME", str(tmp_path / "prefect")))
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-16-plus-240", tiny_config())
    monkeypatch.chdir(folder)
    yield folder
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def parameters() -> list[object]:
    return [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [], id=page) for page in tested_pages()]


@pytest.mark.parametrize("page", parameters())
def test_every_block_of_a_page_runs(page: str, work: Path) -> None:
    runner = Runner(work, load_configuration)
    ran = True
    for block in blocks(page):
        if block.key in NOT_RUN:
            ran = False
        elif block.language != "text" or ran:  # the output of a block that did not run is shown, not compared
            ran = True
            runner.run(block)


def test_blocks_that_are_not_run_exist() -> None:
    known = {block.key for page in tested_pages() for block in blocks(page)}
    assert not [key for key in NOT_RUN if key not in known]


def test_pages_named_here_exist() -> None:
    assert set(tested_pages()) >= SLOW | WITH_SAMPLES
