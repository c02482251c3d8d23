"""The command `adflows zsad score` on people's own photographs: ranks, flags, thresholds, and files that vanish."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows.zsad.features import FeatureStages

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_images: Callable[..., Any]) -> Any:
    return new_images(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _cache(world: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        yield


def photo(path: Path, number: int, *, defect: bool = False) -> Path:
    """Write a photograph of a smooth grey plate with noise, and with a bright square as its defect."""
    pixels = np.random.default_rng(number).normal(120, 4, (64, 64, 3))
    if defect:
        pixels[20:44, 20:44] = (255, 40, 40)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write twelve photographs in two folders, two of them with a defect, with equal names in both folders."""
    for number in range(12):
        photo(tmp_path / "photos" / f"cam{number % 2}" / f"IMG_{number // 2}.png", number, defect=number in {4, 7})
    return tmp_path / "photos"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    for number in range(5):
        photo(tmp_path / "good" / f"{number}.png", 100 + number)
    return tmp_path / "good"


@pytest.fixture
def score(world: Any, cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    def run(images: Path, *options: object, out: str = "out") -> Any:
        return cli("zsad", "score", images, "--config", world.config, "-o", tmp_path / out, "--json", *options)

    return run


VISUAL = ("--set", "method.variants=[visual]")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_are_ranked_and_flagged_images_are_shown(
    score: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    ran = score(photos, *VISUAL)
    assert ran.code == 0, ran.err
    table = rows(tmp_path / "out")
    assert [int(row["rank"]) for row in table] == list(range(1, 13))
    values = [float(row["score"]) for row in table]
    assert values == sorted(values, reverse=True)
    flagged = [row for row in table if row["flagged"] == "1"]
    assert 0 < len(flagged) < len(table)
    shown = sorted(path.name for path in (tmp_path / "out" / "flagged").iterdir())
    assert shown == [f"{int(row['rank']):04d}_{Path(row['file']).stem}.png" for row in flagged]
    assert {row["method"] for row in table} == {"Dual-image"}


def test_good_photographs_give_references_and_a_threshold(
    score: Callable[..., Any], photos: Path, good: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "line 2.json"
    ran = score(photos, *VISUAL, "--normal", good, "--save-threshold", saved)
    assert ran.code == 0, ran.err
    table = rows(tmp_path / "out")
    assert {row["id"] for row in table[:2]} == {"cam0/IMG_2", "cam1/IMG_3"}, "the two with a defect"
    threshold = json.loads(saved.read_text(encoding="utf-8"))
    assert (threshold["source"], threshold["images"]) == ("normal", 5)
    assert {float(row["threshold"]) for row in table} == {threshold["threshold"]}
    assert all((row["flagged"] == "1") == (float(row["score"]) >= threshold["threshold"]) for row in table)
    assert {"cam0/IMG_2", "cam1/IMG_3"} <= {row["id"] for row in table if row["flagged"] == "1"}

    one_more = tmp_path / "tomorrow"
    shutil.copytree(photos, one_more)
    photo(one_more / "new.png", 50)
    later = score(one_more, *VISUAL, "--normal", good, "--threshold", saved, out="later")
    assert later.code == 0, later.err
    before = {row["id"]: (row["score"], row["flagged"]) for row in table}
    after = {row["id"]: (row["score"], row["flagged"]) for row in rows(tmp_path / "later")}
    assert {name: after[name] for name in before} == before, "one more photograph changes no other's score or flag"


@pytest.mark.parametrize("own", [False, True])
def test_all_good_photographs_are_used_unless_settings_say_how_many(
    own: bool, world: Any, cli: Cli, photos: Path, good: Path, tmp_path: Path
) -> None:
    """AnomalyDINO's default is one normal image, of which no threshold can be made."""
    options = ("--config", world.config) if own else ("--set", "encoder.model=embedded", "--set", "gpus=cpu")
    given = ("--method", "anomalydino", "--normal", good, *options, "-o")
    ran = cli("zsad", "score", photos, *given, tmp_path / "all")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "all" / "threshold.json").read_text(encoding="utf-8"))["images"] == 5
    ran = cli("zsad", "score", photos, *given, tmp_path / "some", "--set", "method.shots=3")
    if not own:  # a configuration with another method does not take settings of this one
        assert ran.code == 0, ran.err
        assert json.loads((tmp_path / "some" / "threshold.json").read_text(encoding="utf-8"))["images"] == 3


@pytest.mark.parametrize("command", ["run", "score"])
def test_a_method_that_the_encoder_cannot_serve_is_refused_in_one_line(
    command: str, world: Any, cli: Cli, photos: Path, tmp_path: Path
) -> None:
    dino = ("--set", "encoder.model=dino_vits8", "--set", "encoder.seed=0", "--set", "gpus=cpu")
    if command == "run":
        ran = cli("zsad", "run", "winclip", "--data", photos, "--out", tmp_path / "runs", *dino)
    else:
        ran = cli("zsad", "score", photos, "--method", "winclip", "-o", tmp_path / "out", *dino)
    assert ran.code == 2
    [line] = [line for line in ran.err.splitlines() if "winclip" not in line and line.startswith("adflows: ")]
    assert "encoder.model dino_vits8 has no text tower for the prompts of WinCLIP" in line
    assert "methods without text: musc, musc_2, anomalydino, and dual with the variant visual" in line


def test_a_threshold_of_other_scores_is_refused(
    score: Callable[..., Any], photos: Path, good: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    assert score(photos, *VISUAL, "--normal", good, "--save-threshold", saved).code == 0
    photo(good / "another.png", 200)
    ran = score(photos, *VISUAL, "--normal", good, "--threshold", saved, out="later")
    assert ran.code == 2
    assert "saved.json: this threshold was made with other settings or other normal images" in ran.err


JOINT = ("--set", "method.variants=[joint]")


def test_a_threshold_is_found_with_the_weights_of_the_settings(
    score: Callable[..., Any], photos: Path, good: Path, tmp_path: Path
) -> None:
    """Each good photograph is compared with the other four in both runs. Their highest score is just not reached."""
    saved, heavy = tmp_path / "saved.json", (*JOINT, "--category", "plate", "--set", "method.lambda_4=3")
    assert score(photos, *heavy, "--normal", good, "--save-threshold", saved).code == 0
    assert score(good, *heavy, "--normal", good, out="own").code == 0
    highest = max(float(row["score"]) for row in rows(tmp_path / "own"))
    threshold = json.loads(saved.read_text(encoding="utf-8"))["threshold"]
    assert threshold == pytest.approx(highest, rel=1e-6)
    assert score(photos, *heavy, "--normal", good, "--threshold", saved, out="again").code == 0
    for other in (("--category", "plate"), ("--set", "method.lambda_4=3")):
        ran = score(photos, *JOINT, *other, "--normal", good, "--threshold", saved, out="other")
        assert ran.code == 2, "other weights, or prompts with the folder's name"
        assert "saved.json: this threshold was made with other settings or other normal images" in ran.err


def test_one_photograph_is_enough_for_musc_2_with_good_ones(cli: Cli, good: Path, tmp_path: Path) -> None:
    one = photo(tmp_path / "one" / "a.png", 7, defect=True)
    options = ("--method", "musc_2", "--set", "encoder.model=embedded", "--set", "gpus=cpu")
    ran = cli("zsad", "score", one, *options, "--normal", good, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    [row] = rows(tmp_path / "out")
    assert row["flagged"] == "1"


def test_a_threshold_needs_scores_that_do_not_depend_on_the_other_images(
    score: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    ran = score(photos, *VISUAL, "--save-threshold", tmp_path / "t.json")
    assert ran.code == 2
    assert "add --normal" in ran.err
    assert not (tmp_path / "t.json").exists()
    text = ("--set", "method.variants=[text]")
    assert score(photos, *text, "--save-threshold", tmp_path / "t.json").code == 0
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["source"] == "quantile"
    assert score(photos, *text, "--threshold", tmp_path / "t.json", out="again").code == 0


@pytest.mark.parametrize(("variant", "scored"), [("visual", True), ("joint_tta", False)])
def test_a_photograph_that_vanishes_costs_only_itself(
    score: Callable[..., Any],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    scored: bool,
) -> None:
    """A file is moved away after the encoding. `visual` needs it only for the picture, `joint_tta` for the score."""
    encode = FeatureStages.encode

    def then_remove(stages: FeatureStages, categories: Any) -> None:
        encode(stages, categories)
        (photos / "cam0" / "IMG_0.png").unlink()

    monkeypatch.setattr(FeatureStages, "encode", then_remove)
    ran = score(photos, "--set", f"method.variants=[{variant}]", out=variant)
    assert ran.code == 2
    table = {row["id"]: row for row in rows(tmp_path / variant)}
    assert len(table) == 12
    gone = table.pop("cam0/IMG_0")
    assert bool(gone["score"]) == scored
    assert gone["problem"]
    assert all(row["score"] and not row["problem"] for row in table.values())
    maps = {path.relative_to(tmp_path / variant / "maps") for path in (tmp_path / variant / "maps").rglob("*.png")}
    assert maps == {Path(f"{name}.png") for name in table}
    assert (tmp_path / variant / "report.html").is_file()
    assert sum("IMG_0.png" in line for line in ran.err.splitlines()) == 1
