"""One Prefect server and database for the session, one empty cache for each test."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

# before Prefect is imported: it reads its environment once, and must not use the developer's database
_HOME = tempfile.TemporaryDirectory(prefix="adflows-test-prefect-")
os.environ["PREFECT_HOME"] = _HOME.name
for _name in ("PREFECT_API_URL", "PREFECT_PROFILE", "ADFLOWS_CACHE"):
    os.environ.pop(_name, None)
# not the slots of other work on this machine
os.environ["ADFLOWS_SLOTS"] = str(Path(_HOME.name) / "slots")
# nor the machine's register of pseudonyms
os.environ["ADFLOWS_PRIVATE"] = str(Path(_HOME.name) / "private")

from flows.machine.own_server import prepare_prefect  # noqa: E402

prepare_prefect()

from tests.flows.fake_steps import RUNS  # noqa: E402
from tests.medad.organ.torso import Torso, make_torso  # noqa: E402


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder that this test uses."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ADFLOWS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def torso() -> Torso:
    """Return the part of a torso by construction that has the liver."""
    return make_torso().planes(28, 62)


@pytest.fixture
def no_totalsegmentator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide TotalSegmentator's weights, which would change the method that finds the liver."""
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "weights"))


@pytest.fixture(scope="session", autouse=True)
def read_in_this_process() -> Iterator[None]:
    """Let reading steps run in this process, where tests can replace their parts."""
    from flows.devices import child

    child.reads_apart = False
    yield
    child.reads_apart = True


@pytest.fixture(scope="module", autouse=True)
def forget_learned_names() -> None:
    """Clear the words that the log filter learned from folders of other test modules."""
    from flows.privacy.log_filter import path_filter

    path_filter.clear()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """Start a server with an empty database. Yield the address of its API."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        url = PREFECT_API_URL.value()
        assert url is not None
        yield url


@pytest.fixture(scope="session")
def cli() -> Callable[..., CommandResult]:
    """Return the command line for this process. Its flows run without Prefect, for tests of other things."""
    return functools.partial(run_cli, local=True)


@pytest.fixture(scope="session")
def prefect_cli(prefect_server: str) -> Callable[..., CommandResult]:
    """Return the command line for this process. Its flows run on the session's server."""
    del prefect_server
    return run_cli


@pytest.fixture(scope="session")
def new_world() -> Callable[..., World]:
    """Return the function that writes phantoms and a tiny configuration into a folder."""
    return make_world


@pytest.fixture
def runs() -> list[str]:
    """Return the texts that fake steps really process in this test."""
    RUNS.clear()
    return RUNS


@dataclass(frozen=True)
class CommandResult:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """Return the JSON that the command printed."""
        return json.loads(self.out)


def run_cli(*arguments: object, local: bool = False) -> CommandResult:
    """Run the command line in this process, with the test's cache. With `local`, Prefect is not used."""
    from flows.cli.app import main
    from flows.machine.terminal import terminal

    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = sys.argv
    sys.argv = ["adflows", *map(str, arguments)]
    if local:
        os.environ["ADFLOWS_LOCAL"] = "1"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = argv
        os.environ.pop("ADFLOWS_LOCAL", None)
        terminal.enabled, terminal.verbosity = False, "normal"
    return CommandResult(code, out.getvalue(), err.getvalue())


TINY: dict[str, Any] = {
    "name": "tiny",
    "gpus": "cpu",
    "viewer": False,  # test_case_pages.py writes them
    "train_data": {"root": "", "layout": "btcv"},
    "test_data": {"root": "", "layout": "lits"},
    "preprocess": {"slice_px": 64},
    "synthesis": {"blur_sigma_px": 4.0, "ellipse_px": 3},
    "restoration": {"widths": [8, 16, 32], "groups": 4},
    "segmentation": {"widths": [8, 16, 32], "groups": 4},
    "train": {"restoration": {"epochs": 1}, "segmentation": {"epochs": 1}},
}
"""Settings of the liver flow at a size that takes seconds."""


@dataclass(frozen=True)
class World:
    """Phantoms, a configuration for them, and a cache."""

    root: Path
    config: Path
    cache: Path
    runs: Path

    @property
    def btcv(self) -> Path:
        return self.root / "btcv"

    @property
    def lits(self) -> Path:
        return self.root / "lits"


def make_world(root: Path, *, train: int = 2, test: int = 2) -> World:
    """Write phantoms in both layouts and the tiny configuration."""
    from medad.cohort.phantom import write_btcv_phantoms, write_lits_phantoms

    world = World(root, root / "tiny.yaml", root / "cache", root / "runs")
    size: dict[str, Any] = {"shape": (48, 40, 10), "spacing_mm": (7.0, 7.0, 12.0)}
    write_btcv_phantoms(world.btcv, train, seed=1, **size)
    write_lits_phantoms(world.lits, test, seed=2, **size)
    values = copy.deepcopy(TINY)
    values["train_data"]["root"], values["test_data"]["root"] = str(world.btcv), str(world.lits)
    world.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return world


@pytest.fixture(scope="session")
def new_images() -> Callable[..., ZsadWorld]:
    """Return the function that writes tiny labelled images, a tiny model and a configuration into a folder."""
    return make_images


@dataclass(frozen=True)
class ZsadWorld:
    """Images in MVTec's layout, a configuration for them, and a cache."""

    root: Path
    config: Path
    cache: Path
    runs: Path

    @property
    def data(self) -> Path:
        return self.root / "data"


CATEGORIES = ("cloth", "screw")
IMAGES = ("good/000", "good/001", "stain/000", "stain/001")


def make_images(root: Path) -> ZsadWorld:
    """Write noise images with a bright square as the defect. The tests check what is computed, not what is found."""
    import numpy as np
    from PIL import Image

    world = ZsadWorld(root, root / "small.yaml", root / "cache", root / "runs")
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        for name in IMAGES:
            pixels = rng.integers(0, 100, (40, 40, 3), dtype=np.uint8)
            mask = np.zeros((40, 40), np.uint8)
            if not name.startswith("good"):
                pixels[5:15, 5:15] += 150
                mask[5:15, 5:15] = 255
                target = world.data / category / "ground_truth" / f"{name}_mask.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(target)
            target = world.data / category / "test" / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    write_model(root / "model")
    values = {
        "name": "small",
        "gpus": "cpu",
        "seeds": [0, 1],
        "data": {"root": str(world.data), "layout": "mvtec"},
        "encoder": {"model": f"local-dir:{root / 'model'}"},
        "prompts": {"domains": ["industrial"]},
        "method": {"system": "dual", "variants": ["text", "joint", "joint_tta"]},
        "maps": [],
    }
    world.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return world


def write_model(folder: Path) -> None:
    """Write an open_clip model of three blocks with seeded weights into a folder."""
    from tests.zsad.tiny_clip import tiny_clip, tiny_config, write_folder

    config = tiny_config()
    write_folder(folder, tiny_clip(config), config)
