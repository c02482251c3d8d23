"""The flow zsad-compare on tiny images with a tiny model: all systems, shared features, failures of single systems."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from medad.base.text import PLACEHOLDER
from zsad.config.settings import ZsadSettings

Cli = Callable[..., Any]
TRAINING = {"epochs": 2, "batch_size": 4, "learning_rate": 0.001}
SYSTEMS: list[dict[str, Any]] = [
    {"system": "clip"},
    {"system": "clip_ac"},
    {"system": "winclip"},
    {"system": "winclip", "shots": 1, "label": "WinCLIP 1-shot"},
    {"system": "anovl", "steps": 1},
    {"system": "musc", "blocks": [1, 3], "degrees": [1, 3]},
    {"system": "musc_2", "blocks": [2]},
    {"system": "dual"},
    {"system": "dual", "adaptation": True},
    {"system": "april_gan", "blocks": [2, 3], "training": TRAINING},
    {"system": "anomalyclip", "encoder": "dpam", "depth": 2, "context_tokens": 4, "training": TRAINING},
]
NAMES = [
    *("CLIP", "CLIP-AC", "WinCLIP", "WinCLIP 1-shot", "AnoCLIP", "MuSc", "MuSc-2", "Dual-image", "Dual-image + TTA"),
    *("APRIL-GAN", "AnomalyCLIP"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_images: Callable[..., Any]) -> Any:
    made = new_images(tmp_path_factory.mktemp("world"))
    for category in sorted(made.data.iterdir()):
        normal = min((category / "test" / "good").iterdir())
        (category / "train" / "good").mkdir(parents=True)
        with Image.open(normal) as image:  # not the same: a normal image is never compared with itself
            image.transpose(Image.Transpose.ROTATE_180).save(category / "train" / "good" / "only.png")
    values = yaml.safe_load(made.config.read_text(encoding="utf-8"))
    encoder = values.pop("encoder")
    del values["method"], values["maps"]
    values |= {
        "encoders": {
            "main": encoder,
            "dpam": encoder | {"preset": "anomalyclip", "vv_blocks": 2, "size_px": None, "vv_attention": "qq"},
        },
        "systems": SYSTEMS,
    }
    made.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def finished(world: Any, cli: Cli) -> Iterator[Any]:
    """Run the flow once with an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        yield cli("zsad", "compare", world.config, "--out", world.runs, "--json")


@pytest.fixture
def again(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs the flow again, with the same cache, other options and a new run folder."""
    del finished

    def run(*options: object, config: Path = world.config) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ADFLOWS_CACHE", str(world.cache))
            return cli("zsad", "compare", config, "--out", tmp_path / "runs", "--json", *options)

    return run


def report_of(ran: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    return found


def made(world: Any, step: str) -> int:
    return len(list((world.cache / step).iterdir()))


def test_every_system_is_judged_on_every_category_and_seed(finished: Any, world: Any) -> None:
    assert finished.code == 0, finished.err
    report = report_of(finished)
    assert [system["name"] for system in report["systems"]] == NAMES
    with (Path(finished.answer["run_folder"]) / "systems.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for system in report["systems"]:
        assert set(system["categories"]) == {folder.name for folder in world.data.iterdir()}
        own = [row for row in rows if row["system"] == system["name"]]
        assert len(own) == len(system["categories"]) * (2 if system["seeded"] else 1)
    assert report["failures"] == []


def test_scores_and_maps_of_all_systems_are_written(finished: Any, world: Any) -> None:
    folder = Path(finished.answer["run_folder"])
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    images = {(path.parents[2].name, f"{path.parent.name}/{path.stem}") for path in world.data.glob("*/test/*/*.png")}
    assert {row["system"] for row in rows} == set(NAMES)
    for name in NAMES:
        own = [row for row in rows if row["system"] == name]
        assert {(row["category"], row["id"]) for row in own} == images
        assert all((row["defect"] == "good") == (row["anomalous"] == "0") for row in own)
    for system in ("CLIP", "WinCLIP_1-shot", "Dual-image_TTA"):
        of_system = folder / "maps" / system
        found = {(path.relative_to(of_system).parts[0], path) for path in of_system.rglob("*.png")}
        assert {(of, path.relative_to(of_system / of).with_suffix("").as_posix()) for of, path in found} == images
    assert len(list((folder / "maps").rglob("*.png"))) == len(NAMES) * len(images)


def test_one_forward_serves_all_systems_of_an_encoder(finished: Any, world: Any) -> None:
    del finished
    categories = len(list(world.data.iterdir()))
    shots = made(world, "zsad-encode") - 2 * categories  # for two encoders
    indices = [folder / "index.json" for folder in (world.cache / "zsad-encode").iterdir()]
    kept = [tuple(json.loads(index.read_text(encoding="utf-8"))["outputs"]) for index in indices]
    windows = ("window-2", "window-3")
    all_but_dpam = ("block-1", "block-2", "block-3", "patches", "plain", "raw", *windows)
    assert Counter(kept) == dict.fromkeys([all_but_dpam, ("patches",), ("raw", *windows)], categories)
    assert shots == categories, "each category has one normal image, so all seeds choose it"
    assert made(world, "zsad-train") == 2 * categories, "each learned system is trained on the other category"


def test_each_task_is_counted_once(finished: Any) -> None:
    records = json.loads((Path(finished.answer["run_folder"]) / "manifest.json").read_text(encoding="utf-8"))["tasks"]
    keys = [(record["step"], record["case_id"]) for record in records]
    assert len(set(keys)) == len(keys)
    assert finished.answer["computed"] + finished.answer["cached"] == len(records)


def test_a_second_run_computes_nothing(again: Callable[..., Any]) -> None:
    ran = again()
    assert (ran.code, ran.answer["computed"]) == (0, 0)


def test_chosen_systems_alone_are_compared(again: Callable[..., Any]) -> None:
    assert [system["name"] for system in report_of(again("--methods", "clip, winclip 1-SHOT"))["systems"]] == [
        "CLIP",
        "WinCLIP 1-shot",
    ]
    unknown = again("--methods", "clip,padim")
    assert unknown.code == 2
    assert "padim: no such system" in unknown.err


def test_a_system_that_does_not_fit_its_encoder_is_listed_and_the_others_go_on(
    again: Callable[..., Any], world: Any
) -> None:
    values = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    other = world.config.with_name("misfit.yaml")
    systems = [{"system": "clip"}, {"system": "musc", "blocks": [4]}, {"system": "anomalyclip", "checkpoint": "absent"}]
    other.write_text(yaml.safe_dump(values | {"systems": systems}), encoding="utf-8")
    ran = again(config=other)
    assert ran.code == 2
    report = report_of(ran)
    assert {system["name"] for system in report["systems"] if system["categories"]} == {"CLIP"}
    rules = {failure["system"]: failure["rule"] for failure in report["failures"]}
    assert "block 4" in rules["MuSc"]
    assert "3 blocks" in rules["MuSc"]
    assert rules["AnomalyCLIP"] == "no such file"


def test_a_learned_system_needs_other_images_than_those_it_is_judged_on(again: Callable[..., Any], world: Any) -> None:
    one = next(iter(sorted(folder.name for folder in world.data.iterdir())))
    ran = again("--methods", "clip,april_gan", "--set", f"data.categories=[{one}]")
    assert ran.code == 2
    (failure,) = report_of(ran)["failures"]
    assert failure["system"] == "APRIL-GAN"
    assert "is trained on other categories" in failure["rule"]


def test_a_checkpoint_of_the_command_train_serves_a_comparison(
    again: Callable[..., Any], world: Any, cli: Cli, tmp_path: Path
) -> None:
    options = ("--config", world.config, "--out", tmp_path, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        trained = cli("zsad", "train", "april_gan", "--on", world.data, *options)
        refused = cli("zsad", "train", "clip", "--on", world.data, *options)
        told = cli("zsad", "train", "april_gan", "--on", world.data, *options[:-1])
    assert trained.code == 0, trained.err
    assert refused.code == 2
    checkpoint = Path(trained.answer["run_folder"]) / "checkpoint.safetensors"
    assert f"checkpoint: {checkpoint}" in told.out
    values = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    system = next(one for one in SYSTEMS if one["system"] == "april_gan")
    other = world.config.with_name("given.yaml")
    other.write_text(yaml.safe_dump(values | {"systems": [system | {"checkpoint": str(checkpoint)}]}), encoding="utf-8")
    ran = again(config=other)
    assert ran.code == 0, ran.err
    assert set(report_of(ran)["systems"][0]["categories"]) == {folder.name for folder in world.data.iterdir()}


def test_ablations_stand_beside_the_systems(again: Callable[..., Any]) -> None:
    report = report_of(again("--methods", "dual", "--set", "ablations=[image_weights]", "--set", "seeds=[0]"))
    (ablation,) = report["ablations"]
    assert len(ablation["rows"]) == 4


def test_no_folder_reaches_prefect() -> None:
    secret = "/home/doe_jane/images"
    settings = ZsadSettings.model_validate(
        {
            "name": "x",
            "data": {"root": secret, "masks": secret},
            "auxiliary": {"root": secret},
            "encoders": {
                "main": {"model": "ViT-B-16", "weights": f"{secret}/b.pt"},
                "own": {"model": f"local-dir:{secret}"},
            },
            "systems": [
                {"system": "anomalyclip", "checkpoint": f"{secret}/c.safetensors"},
                {
                    "system": "segmentation",
                    "clipseg": secret,
                    "sam": secret,
                    "salient": f"{secret}/s.pt",
                    "trust_salient": True,
                },
                {"system": "dual", "adapt": {"textures": secret}},
            ],
        }
    )
    text = settings.model_dump_json()
    assert "doe_jane" not in text
    assert f"{PLACEHOLDER}/b.pt" in text
    assert settings.data.root == secret, "the flow itself gets the real path"
