"""The flow zsad on tiny images with a tiny model: its results, repeated steps, and effects of bad images."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zsad
from flows.store.digests import file_sha256
from zsad.config.run import PromptSettings
from zsad.scorers.dual.settings import DualImage

Cli = Callable[..., Any]
CATEGORIES, SEEDS, IMAGES = 2, 2, 4
ALL = CATEGORIES * (2 + 2 * SEEDS) + 1
"""Numbers of tasks: text and images; scores and evaluation of each seed; the report."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_images: Callable[..., Any]) -> Any:
    return new_images(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Any, prefect_cli: Cli) -> Iterator[Any]:
    """Run the flow once under Prefect with an empty cache. Other tests use the cached results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        yield prefect_cli("zsad", "run", world.config, "--out", world.runs, "--json")


@pytest.fixture
def again(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs the flow again, with the same cache, other options and a new run folder."""
    del finished

    def run(*options: object) -> Any:
        return cli("zsad", "run", world.config, "--out", tmp_path / "runs", "--json", *options)

    return run


def steps(ran: Any, *, cached: bool = False) -> set[str]:
    manifest = json.loads((Path(ran.answer["run_folder"]) / "manifest.json").read_text(encoding="utf-8"))
    return {task["step"] for task in manifest["tasks"] if task["cached"] == cached}


def rows(ran: Any, name: str) -> list[dict[str, str]]:
    with (Path(ran.answer["run_folder"]) / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_run_folder_holds_everything(world: Any, finished: Any) -> None:
    assert finished.code == 0, finished.err
    answer = finished.answer
    assert (answer["computed"], answer["cached"], answer["failures"]) == (ALL, 0, [])
    assert set(answer["headline"]) == {"image_auroc", "pixel_auroc", "pixel_aupro"}
    folder = Path(answer["run_folder"])
    assert folder == world.runs / "zsad" / "small"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    tables = {"results.csv", "scores.csv", "curves.csv"}
    assert found == {"manifest.json", "report.html", "report.json", "preview.png", *tables}
    assert answer["notices"] == []
    for name in tables:
        assert {row["encoder"] for row in rows(finished, name)} == {"the model in folder model"}
    assert {row["category"] for row in rows(finished, "results.csv")} == {"cloth", "screw", "mean over categories"}


def test_the_manifest_says_what_went_in_and_what_came_out(world: Any, finished: Any) -> None:
    folder = Path(finished.answer["run_folder"])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        assert file_sha256(folder / name) == entry["sha256"]
    digests = {(row["category"], row["image"]): row["sha256"] for row in manifest["inputs"]}
    assert len(digests) == CATEGORIES * IMAGES
    stain = digests["screw", "stain/001"]
    assert stain["image"] == file_sha256(world.data / "screw" / "test" / "stain" / "001.png")
    assert stain["mask"] == file_sha256(world.data / "screw" / "ground_truth" / "stain" / "001_mask.png")
    assert manifest["encoders"]["main"]["weights"] == file_sha256(world.root / "model" / "open_clip_model.safetensors")
    assert manifest["settings"]["seeds"] == [0, 1]
    assert manifest["versions"]["open_clip_torch"]
    assert str(world.root) not in json.dumps(manifest)


def test_a_second_run_computes_nothing_and_says_so(again: Callable[..., Any], finished: Any) -> None:
    second = again("--name", "small")
    assert second.code == 0
    assert (second.answer["computed"], second.answer["cached"]) == (0, ALL)
    assert second.answer["headline"] == finished.answer["headline"]


def test_other_lambdas_encode_and_adapt_nothing(again: Callable[..., Any]) -> None:
    ran = again("--set", "method.lambda_2=9")
    assert ran.code == 0
    assert steps(ran) == {"zsad-fuse", "zsad-evaluate", "zsad-report"}
    assert not steps(ran) & steps(ran, cached=True)


def test_seeds_that_were_scored_are_used_again(again: Callable[..., Any]) -> None:
    ran = again("--seed", 1)
    assert steps(ran) == {"zsad-report"}
    assert {row["seed"] for row in rows(ran, "scores.csv")} == {"1"}


def test_renamed_moved_and_reordered_images_are_the_same_images(
    again: Callable[..., Any], finished: Any, world: Any, tmp_path: Path
) -> None:
    """Only the report depends on names."""
    moved = tmp_path / "moved"
    shutil.copytree(world.data, moved)
    for folder, ending in (("test", ".png"), ("ground_truth", "_mask.png")):
        for path in (moved / "screw" / folder).rglob("*.png"):
            number = path.name.removesuffix(ending)
            path.rename(path.with_name(f"{9 - int(number)}-new{ending}"))
    ran = again("--data", moved)
    assert ran.code == 0
    assert steps(ran) == {"zsad-report"}
    assert ran.answer["headline"] == finished.answer["headline"]
    ids = {row["id"] for row in rows(ran, "scores.csv") if row["category"] == "screw"}
    assert ids == {f"{kind}/{number}-new" for kind in ("good", "stain") for number in (8, 9)}


def test_bad_images_are_listed_and_the_others_go_on(again: Callable[..., Any], world: Any, tmp_path: Path) -> None:
    from PIL import Image

    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    test, truth = data / "cloth" / "test", data / "cloth" / "ground_truth" / "stain"
    whole = (test / "good" / "000.png").read_bytes()
    (test / "good" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(test / "good" / "dot.png")
    shutil.copy(test / "stain" / "000.png", test / "stain" / "unmasked.png")
    Image.open(test / "stain" / "001.png").rotate(90).save(test / "stain" / "large.png")
    Image.new("L", (41, 40), 255).save(truth / "large_mask.png")
    ran = again("--data", data)
    assert ran.code == 2
    failures = {failure["case"]: failure for failure in ran.answer["failures"]}
    assert set(failures) == {f"cloth/{name}" for name in ("good/cut", "good/dot", "stain/unmasked", "stain/large")}
    lines = ran.err.splitlines()
    assert lines.count(f"{test / 'good' / 'cut.png'}: {failures['cloth/good/cut']['rule']}") == 1
    for failure in failures.values():
        assert sum(line.endswith(f": {failure['rule']}") and line.startswith(str(data)) for line in lines) == 1
    assert "Traceback" not in ran.err
    report = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    assert {(row["category"], row["id"]) for row in report["failures"]} == {
        tuple(case_id.split("/", 1)) for case_id in failures
    }
    assert "good/cut" in (Path(ran.answer["run_folder"]) / "report.html").read_text(encoding="utf-8")
    images = {row["id"] for row in rows(ran, "scores.csv") if row["category"] == "cloth"}
    assert images == {"good/000", "good/001", "stain/000", "stain/001", "stain/large"}
    # the other category is unchanged, and bad images are still listed if everything is cached
    assert again("--data", data).answer["computed"] == 0
    assert {failure["case"] for failure in again("--data", data).answer["failures"]} == set(failures)


def test_a_report_is_written_when_there_is_nothing_to_score(again: Callable[..., Any], tmp_path: Path) -> None:
    ran = again("--data", tmp_path / "nowhere")
    assert ran.code == 2
    [failure] = ran.answer["failures"]
    assert f"{tmp_path / 'nowhere'}: {failure['rule']}" in ran.err.splitlines()
    assert (Path(ran.answer["run_folder"]) / "report.html").is_file()


def test_weights_that_are_not_there_are_said_once(again: Callable[..., Any], tmp_path: Path) -> None:
    ran = again("--set", f"encoder.model=local-dir:{tmp_path}")
    assert ran.code == 2
    assert sum(str(tmp_path) in line for line in ran.err.splitlines()) == 1, ran.err


def test_one_image_alone_is_scored_by_the_prompts_and_it_is_said(
    world: Any, finished: Any, cli: Cli, tmp_path: Path
) -> None:
    del finished
    image = world.data / "screw" / "test" / "good" / "000.png"
    ran = cli("zsad", "score", image, "--config", world.config, "--category", "screw", "-o", tmp_path / "one", "--json")
    assert ran.code == 0, ran.err
    report = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "no second image" in report
    assert len(rows(ran, "scores.csv")) == 1


def test_unlabelled_images_are_scored_and_bad_ones_named(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    del finished
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 255, (40, 50, 4), dtype=np.uint8)).save(folder / "rgba.png")
    Image.fromarray(rng.integers(0, 2**16, (40, 50), dtype=np.uint16)).save(folder / "deep.tiff")
    wide = np.broadcast_to(np.arange(12_000) // 50, (400, 12_000)).astype(np.uint8)
    Image.fromarray(np.dstack([wide, wide[::-1], 255 - wide])).save(folder / "long.png", compress_level=1)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    ran = cli("zsad", "score", folder, "--config", world.config, "-o", tmp_path / "out", "--npy", "--json")
    assert ran.code == 2
    lines = ran.err.splitlines()
    for name in ("dot.png", "broken.png"):
        assert sum(line.startswith(f"{folder / name}: ") for line in lines) == 1
    out = tmp_path / "out"
    scored = {"grey", "rgba", "deep", "long"}
    table = {row["file"]: row for row in rows(ran, "scores.csv")}
    assert {Path(name).stem for name, row in table.items() if row["score"]} == scored
    assert {name for name, row in table.items() if row["problem"]} == {"dot.png", "broken.png"}
    for ending in ("png", "npy"):  # with a second kind of float map, `evaluate` would find two maps per image
        assert {path.stem for path in (out / "maps").glob(f"*.{ending}")} == scored
    assert not list((out / "maps").glob("*.tiff"))
    assert np.load(out / "maps" / "long.npy").shape == (400, 12_000)
    with Image.open(out / "maps" / "long.png") as picture:
        assert picture.size == (2048, round(400 * 2048 / 12_000))
    assert (out / "report.html").is_file()
    again = cli("zsad", "score", folder, "--config", world.config, "-o", tmp_path / "out", "--npy", "--json")
    assert again.answer["computed"] == 0
    in_python = zsad.score(
        [folder / name for name in table if table[name]["score"]],
        DualImage(adaptation=True),
        encoder=f"local-dir:{world.root / 'model'}",
        prompts=PromptSettings(domains=("industrial",)),
        device="cpu",
    )
    for image in in_python:
        assert image.score == pytest.approx(float(table[image.path.name]["score"]), abs=1e-5)
        np.testing.assert_allclose(image.map, np.load(out / "maps" / f"{image.path.stem}.npy"), atol=1e-5)


def test_what_was_left_out_and_odd_pixels_are_noted(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    del finished
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for photo in (b"a.png", b"b.jfif", b"odd\xff.png"):
        with open(os.fsencode(folder) + b"/" + photo, "wb") as file:  # noqa: PTH123
            kind = "JPEG" if b"jf" in photo else "PNG"
            Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(file, format=kind)
    for n in range(5):
        Image.new("L", (40, 50), n).save(folder / f"black{n}.png")
    for name in ("clip.mp4", "raw.cr2", "more.cr2", "Thumbs.db"):
        (folder / name).write_bytes(b"0" * 9)
    for n in range(30):
        (folder / f"html{n}.jpg").write_bytes(b"<!DOCTYPE html>" + str(n).encode())
    ran = cli("zsad", "score", folder, "--config", world.config, "-o", tmp_path / "out", "--json")
    assert ran.code == 2
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    notes = [
        "Left out: 2 x .cr2, 1 x .mp4.",
        "photos: Almost uniform frame, in which there is nothing to compare: black0, black1, black2 and 2 more.",
    ]
    assert set(notes) <= set(report["notes"])
    assert set(notes) <= set(ran.answer["notices"])
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert all(note in page for note in notes)
    said = [line for line in ran.err.splitlines() if "HTML page" in line]
    assert len(said) == 1
    assert said[0].endswith("(and 29 more of this kind in photos)")
    assert len([one for one in ran.answer["failures"] if "HTML page" in one["rule"]]) == 30
    assert page.count("is an HTML page") == 1
    scored = {row["id"] for row in rows(ran, "scores.csv") if row["score"]}
    assert scored == {"a", "b", "oddÿ", *(f"black{n}" for n in range(5))}


def test_odd_masks_are_noted_in_the_report_of_a_run(again: Callable[..., Any], world: Any, tmp_path: Path) -> None:
    from PIL import Image, ImageOps

    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    truth = data / "cloth" / "ground_truth" / "stain"
    with Image.open(truth / "000_mask.png") as mask:
        ImageOps.invert(mask).save(truth / "000_mask.png")
    Image.new("L", (40, 40), 255).save(truth / "001_mask.png")
    (data / "screw" / "test" / "good").rename(data / "screw" / "test" / "PASS")
    ran = again("--data", data)
    assert ran.code == 2
    assert {one["case"]: one["rule"] for one in ran.answer["failures"]} == {
        "cloth/stain/001": "the mask covers the whole image; normal pixels must be black",
        **{
            f"screw/PASS/{n:03}": f"anomalous, but without a mask: no {n:03}[_mask].png in ground_truth/"
            for n in (0, 1)
        },
    }
    said = "\n".join(ran.answer["notices"])
    assert "may be inverted: stain/000." in said
    assert "screw: no folder is called good, normal or ok (PASS, stain)" in said
    assert "data.normal=[PASS]" in said
    undefined = [row for row in rows(ran, "results.csv") if row["category"] == "screw"]
    assert all(row["image_ap"] == row["image_f1max"] == row["image_auroc"] == "" for row in undefined)
    means, cloth = (
        {(row["variant"], row["seed"]): row["image_ap"] for row in rows(ran, "results.csv") if row["category"] == name}
        for name in ("mean over categories", "cloth")
    )
    for variant in ("text", "joint", "joint_tta"):
        of_seeds = [float(cloth[variant, seed]) for seed in ("0", "1")]
        assert float(means[variant, "mean"]) == pytest.approx(sum(of_seeds) / 2)
    labelled = again("--data", data, "--set", "data.normal=[PASS]")
    assert {one["case"] for one in labelled.answer["failures"]} == {"cloth/stain/001"}


def test_the_embedded_models_scores_say_so_in_every_output(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    del finished
    images = sorted((world.data / "screw" / "test" / "good").glob("*.png"))
    command = ("zsad", "score", *images, "--config", "demo", "--set", "encoder.size_px=64", "-o", tmp_path / "out")
    ran = cli(*command, "--json")
    assert ran.code == 0, ran.err
    notice = ran.answer["notices"][0]
    assert notice.startswith("Embedded model.")
    assert notice in cli(*command).out
    out = tmp_path / "out"
    for name in ("report.html", "report.json"):
        assert "Embedded model." in (out / name).read_text(encoding="utf-8")
    assert {row["encoder"].split(":")[0] for row in rows(ran, "scores.csv")} == {"embedded"}
    for image in images:
        with Image.open(out / "maps" / image.name) as png, Image.open(out / "maps" / f"{image.stem}.tiff") as tiff:
            assert notice in png.info["Description"]
            assert notice in tiff.tag_v2[270]  # type: ignore[attr-defined]
            assert np.asarray(tiff).dtype == np.float32


def test_prefects_ui_shows_categories_figures_and_a_picture(finished: Any, world: Any) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    del finished
    with get_client(sync_client=True) as client:
        artifacts = {
            key: client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
            for key in ("zsad-categories", "zsad-report", "zsad-preview")
        }
    assert all(artifacts.values()), {key: len(found) for key, found in artifacts.items()}
    tables = [json.loads(str(found.data)) for found in artifacts["zsad-categories"]]
    assert any({row["category"] for row in table} == {"cloth", "screw"} for table in tables)
    assert any(str(world.runs / "zsad" / "small" / "report.html") in str(f.data) for f in artifacts["zsad-report"])


def test_a_set_without_normal_images_has_pixel_figures_alone(world: Any, cli: Cli, tmp_path: Path) -> None:
    for kind, source in (("images", "test"), ("masks", "ground_truth")):
        (tmp_path / "polyps" / kind).mkdir(parents=True)
        for path in sorted((world.data / "screw" / source / "stain").glob("*.png")):
            shutil.copy(path, tmp_path / "polyps" / kind / path.name.replace("_mask", ""))
    changes = ("name=polyps", f"data.root={tmp_path / 'polyps'}", "data.layout=kvasir", "seeds=[0]")
    sets = [word for change in changes for word in ("--set", change)]
    ran = cli("zsad", "run", world.config, "--out", tmp_path / "runs", "--json", *sets)
    assert ran.code == 0, ran.err
    assert ran.answer["failures"] == []
    assert ran.answer["headline"]["image_auroc"] is None
    assert 0 <= ran.answer["headline"]["pixel_auroc"] <= 1
    assert 0 <= ran.answer["headline"]["pixel_aupro"] <= 1
