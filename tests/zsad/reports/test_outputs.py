"""Tests of the outputs of `score`: a table, heat maps at the size of the images, and a report."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.io import imread

from medad.base.errors import CaseFailure
from tests.zsad.scored_sets import BACKGROUND, ExampleImage, usual, without_labels, write_category, zsad_settings
from zsad.clip.models import EMBEDDED_FOLDER, describe_encoder
from zsad.config.run import EncoderSettings, EvaluationSettings, ImagesSettings, ScoreSettings
from zsad.config.settings import ZsadSettings
from zsad.data.images import resize_map
from zsad.reports.run import maps
from zsad.reports.run.data import load_category
from zsad.reports.run.maps import PNG_SIDE_PX, MapFormat
from zsad.reports.run.outputs import write_score_outputs
from zsad.steps.evaluate_maps import evaluate_folders
from zsad.steps.results import CategoryResult

TIFF_DESCRIPTION = 270
Category = Callable[..., CategoryResult[Path]]
Array = np.ndarray[Any, Any]


def score_settings(**changes: Any) -> ZsadSettings:
    return zsad_settings(**({"seeds": (0,), "score": ScoreSettings(variants=("joint",))} | changes))


def write(
    out: Path,
    category: CategoryResult[Path] | None,
    settings: ZsadSettings,
    failures: Sequence[CaseFailure] = (),
    formats: Sequence[MapFormat] = ("png", "tiff"),
) -> list[dict[str, str]]:
    out.mkdir()
    write_score_outputs(
        out, settings=settings, category=category, failures=failures, versions={}, notes=[], formats=formats
    )
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> Array:
    with Image.open(path) as image:
        return np.asarray(image)


def test_every_image_has_its_row_and_its_maps_at_its_own_size(category: Category, tmp_path: Path) -> None:
    settings = score_settings()
    drawn = [
        ExampleImage("a", None, 0.2),
        ExampleImage("wide", None, 0.6, defect=(10, 30, 100, 140), size_hw=(40, 240)),
        ExampleImage("line.2/b.c", None, 0.9, defect=(0, 50, 0, 50), size_hw=(99, 65)),
    ]
    result = category("parts", drawn, settings)
    rows = write(tmp_path / "out", result, settings, formats=("png", "tiff", "npy"))
    assert [row["id"] for row in rows] == ["line.2/b.c", "wide", "a"], "highest score first"
    rows = sorted(rows, key=lambda row: row["id"])
    loaded = load_category(result, ("joint",))
    for row, image in zip(rows, loaded.images, strict=True):
        height, width = next(one.size_hw for one in drawn if one.id == row["id"])
        assert (int(row["height_px"]), int(row["width_px"])) == (height, width)
        base = tmp_path / "out" / "maps" / row["id"]
        expected = resize_map(loaded.score_map(image, "joint", settings.evaluation), (height, width))
        tiff, npy = imread(f"{base}.tiff"), np.load(f"{base}.npy")
        assert tiff.dtype == npy.dtype == np.float32
        np.testing.assert_array_equal(tiff, expected)
        np.testing.assert_array_equal(npy, expected)
        assert pixels(Path(f"{base}.png")).shape == (height, width, 3)
        assert float(row["score"]) == loaded.image_scores[0][image.sha256]["joint"]
        assert row["file"] == image.path.name


def test_a_map_is_high_where_the_defect_is_and_flat_where_none_is(category: Category, tmp_path: Path) -> None:
    settings = score_settings()
    drawn = [ExampleImage("flat", None, 0.2), ExampleImage("hole", None, 0.9, peak=1.0, defect=(16, 48, 16, 48))]
    result = category("parts", drawn, settings)
    write(tmp_path / "out", result, settings)
    flat, hole = (imread(tmp_path / "out" / "maps" / f"{name}.tiff") for name in ("flat", "hole"))
    # joint is A_V + A_L, and both are equal here
    np.testing.assert_array_equal(flat, np.float32(2 * BACKGROUND))
    # between the centres of the peak's patches, without the pixels that the two resizings blur
    assert hole[26:38, 26:38].min() == 2.0
    assert hole[:6, :6].max() == 2 * BACKGROUND
    # the heat map PNG of the flat image is the image itself
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "maps" / "flat.png"), pixels(result.images[0].path))


def test_written_maps_measure_what_the_scores_measure(category: Category, tmp_path: Path) -> None:
    """The command `evaluate` on the maps of `score` gives the metrics of the run, at the size of the images."""
    settings = score_settings(evaluation=EvaluationSettings(size_px=64))
    result = category("screw", usual(3, 3), settings)
    write(tmp_path / "out", result, settings)
    masks = tmp_path / "masks"
    for image in result.images:
        path = masks / f"{image.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = pixels(image.mask) if image.mask else np.zeros((64, 64), np.uint8)
        Image.fromarray(mask).save(path)
    found = evaluate_folders(tmp_path / "out" / "maps", masks, EvaluationSettings(size_px=64))
    assert not found.problems
    measured = load_category(result, ("joint",)).evaluated[0].variants["joint"].pixel
    assert found.pixel == measured


def test_one_colour_scale_for_all_images(category: Category, tmp_path: Path) -> None:
    settings = score_settings()
    # three different widths, because equal contents count as one image; each defect touches every patch
    widths = {0.25: 56, 0.5: 58, 1.0: 60}
    same = [ExampleImage(f"x{peak}", None, 0.5, peak=peak, defect=(0, 64, 0, wide)) for peak, wide in widths.items()]
    write(tmp_path / "out", category("parts", same, settings), settings)
    shown = [pixels(tmp_path / "out" / "maps" / f"{one.id}.png")[32, 32].astype(int) for one in same]
    # all images are red there; only the score on the common scale differs, from black to yellow
    greens = [int(colour[1]) for colour in shown]
    assert greens == sorted(greens)
    assert greens[2] > greens[0] + 60


def test_flagged_by_the_deployable_threshold(category: Category, tmp_path: Path) -> None:
    settings = score_settings(
        score=ScoreSettings(variants=("text",)), evaluation=EvaluationSettings(threshold=0.5), seeds=(7,)
    )
    drawn = [ExampleImage(f"x{i}", None, i / 8) for i in range(8)]
    rows = write(tmp_path / "out", category("parts", drawn, settings), settings)
    # a score equal to the threshold is flagged
    assert [(float(row["score"]), row["flagged"]) for row in rows] == [
        (i / 8, str(int(i >= 4))) for i in range(7, -1, -1)
    ]
    assert {row["threshold"] for row in rows} == {"0.5"}


def test_few_images_have_no_quantile_and_no_flags(category: Category, tmp_path: Path) -> None:
    settings = score_settings()
    drawn = [ExampleImage("a", None, 0.1), ExampleImage("b", None, 0.2)]
    rows = write(tmp_path / "out", category("parts", drawn, settings), settings)
    assert {(row["threshold"], row["flagged"]) for row in rows} == {("", "")}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "too few images" in page
    # neither flagged nor not flagged
    assert page.count('<td class="text">–</td></tr>') == 2
    assert "outline of the true mask" not in page


def test_failed_images_are_in_the_table_and_the_rest_goes_on(category: Category, tmp_path: Path) -> None:
    settings = score_settings()
    result = category("parts", without_labels(usual(3, 0)), settings)
    failures = [
        CaseFailure("parts/x/broken", "encode", "the image is broken (truncated)", "broken.png", "parts"),
        CaseFailure(
            "parts/tiny", "encode", "is 1 x 1 pixels; the shorter side must have at least 8", "tiny.png", "parts"
        ),
    ]
    rows = write(tmp_path / "out", result, settings, failures)
    assert [row["id"] for row in rows] == ["good/2", "good/1", "good/0", "tiny", "x/broken"]
    assert rows[4] == {
        "rank": "",
        "id": "x/broken",
        "file": "broken.png",
        "score": "",
        "threshold": "",
        "flagged": "",
        "width_px": "",
        "height_px": "",
        "problem": "the image is broken (truncated)",
        "method": "Dual-image",
        "encoder": "open_clip ViT-B-16-plus-240",
    }
    document = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [one["id"] for one in document["failures"]] == ["tiny", "x/broken"]


def test_nothing_could_be_scored(tmp_path: Path) -> None:
    failed = [CaseFailure("parts/a", "encode", "the image is broken", "a.png", "parts")]
    rows = write(tmp_path / "out", None, score_settings(), failed)
    assert [(row["id"], row["problem"]) for row in rows] == [("a", "the image is broken")]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"problems.json", "report.html", "report.json", "scores.csv"}
    assert "No image was scored." in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_opaque_ids_keep_file_names_out(category: Category, tmp_path: Path) -> None:
    settings = score_settings(data=ImagesSettings(root="x", pseudonyms=True))
    result = category("parts", [ExampleImage("Order-4711", None, 0.5), ExampleImage("b", None, 0.1)], settings)
    pseudonymous = tuple(dataclasses.replace(one, id=f"image-{n}") for n, one in enumerate(result.images))
    failed = [CaseFailure("parts/image-9", "encode", "broken", "Order-4712.png", "parts")]
    rows = write(tmp_path / "out", dataclasses.replace(result, images=pseudonymous), settings, failed)
    assert {row["file"] for row in rows} == {""}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"Order" not in everything
    assert (tmp_path / "out" / "maps" / "image-0.tiff").exists()


@pytest.mark.parametrize("formats", [(), ("png",), ("npy",), ("png", "npy")])
def test_only_the_formats_asked_for(category: Category, tmp_path: Path, formats: tuple[MapFormat, ...]) -> None:
    settings = score_settings()
    result = category("parts", [ExampleImage("a", None, 0.5), ExampleImage("b", None, 0.1)], settings)
    write(tmp_path / "out", result, settings, formats=formats)
    found = {path.suffix for path in (tmp_path / "out" / "maps").rglob("*") if path.is_file()}
    # a .npy file has no description of its map
    assert found == {f".{name}" for name in formats} | ({".txt"} if "npy" in formats else set())


def test_a_very_long_image_keeps_its_float_map_and_gets_a_smaller_picture(category: Category, tmp_path: Path) -> None:
    settings = score_settings()
    long = ExampleImage("long", None, 0.5, peak=1.0, defect=(0, 300, 3000, 3300), size_hw=(300, 6000))
    result = category("parts", [long, ExampleImage("b", None, 0.1)], settings)
    write(tmp_path / "out", result, settings)
    scores = imread(tmp_path / "out" / "maps" / "long.tiff")
    assert scores.shape == (300, 6000)
    assert 3000 <= np.argmax(scores.mean(axis=0)) < 3300
    assert pixels(tmp_path / "out" / "maps" / "long.png").shape == (round(300 * PNG_SIDE_PX / 6000), PNG_SIDE_PX, 3)


def test_the_notice_of_the_embedded_model_is_on_the_page_and_progress_is_told(
    category: Category, tmp_path: Path
) -> None:
    settings = score_settings(encoder=EncoderSettings(model="embedded"))
    result = category("parts", without_labels(usual(2, 2)), settings, model=describe_encoder(settings.encoder))
    progress: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    write_score_outputs(
        tmp_path / "out",
        settings=settings,
        category=result,
        failures=[],
        versions={},
        notes=["Four images."],
        on_progress=lambda done, of: progress.append((done, of)),
    )
    assert progress == [(n, 4) for n in range(1, 5)]
    maps = tmp_path / "out" / "maps"
    for image in result.images:
        with Image.open(maps / f"{image.id}.png") as png, Image.open(maps / f"{image.id}.tiff") as tiff:
            for description in (png.info["Description"], tiff.tag_v2[TIFF_DESCRIPTION]):  # type: ignore[attr-defined]
                assert "Embedded model." in description
                assert "not CLIP" in description
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8", newline="") as file:
        assert all("embedded" in row["encoder"] for row in csv.DictReader(file))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Embedded model." in page
    assert "Four images." in page
    assert "F1max" not in page.split('id="definitions"')[0]


@pytest.mark.parametrize("embedded", [True, False])
def test_maps_without_a_place_for_words_have_them_beside_them(
    category: Category, tmp_path: Path, embedded: bool
) -> None:
    """This includes a copy of the embedded model, which is recognised by its weights."""
    settings = score_settings(encoder=EncoderSettings(model="local-dir:/somewhere/mine"))
    weights = hashlib.sha256((EMBEDDED_FOLDER / "open_clip_model.safetensors").read_bytes()).hexdigest()
    result = category(
        "parts",
        without_labels(usual(2, 0)),
        settings,
        model=describe_encoder(settings.encoder),
        weights=f"sha256:{weights}" if embedded else "sha256:1234",
    )
    rows = write(tmp_path / "out", result, settings, formats=("npy",))
    about = (tmp_path / "out" / "maps" / "about.txt").read_text(encoding="utf-8")
    assert "the model in folder mine" in about
    assert ("Embedded model." in about) == embedded
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ("Embedded model." in page) == embedded
    name = "the model in folder mine" + (" (the embedded model)" if embedded else "")
    assert {row["encoder"] for row in rows} == {name}


def test_where_nothing_could_be_scored_the_table_still_names_the_encoder(tmp_path: Path) -> None:
    settings = score_settings(encoder=EncoderSettings(model="embedded"))
    rows = write(
        tmp_path / "out", None, settings, [CaseFailure("parts/a", "encode", "the image is broken", "a.png", "parts")]
    )
    assert [row["encoder"] for row in rows] == [describe_encoder(settings.encoder)]


def test_a_lost_image_keeps_its_score_and_has_a_problem(tmp_path: Path) -> None:
    settings = score_settings()
    result = write_category(tmp_path, "parts", without_labels(usual(2, 0)), settings)
    lost, kept = result.images
    lost.path.unlink()
    rows = {row["id"]: row for row in write(tmp_path / "out", result, settings)}
    assert rows[lost.id]["score"]
    assert "no such file" in rows[lost.id]["problem"]
    assert not rows[kept.id]["problem"]
    problems = json.loads((tmp_path / "out" / "problems.json").read_text(encoding="utf-8"))
    assert problems == {lost.id: rows[lost.id]["problem"]}
    maps = tmp_path / "out" / "maps"
    assert (maps / f"{kept.id}.png").is_file()
    assert not (maps / f"{lost.id}.png").exists()
    assert (maps / f"{lost.id}.tiff").is_file(), "the map itself needs no photograph"


def test_names_too_long_for_the_file_system_are_cut(tmp_path: Path) -> None:
    settings = score_settings()
    result = write_category(tmp_path, "parts", without_labels(usual(2, 0)), settings)
    long = dataclasses.replace(result.images[0], id=f"{'ü' * 120}")
    rows = write(tmp_path / "out", dataclasses.replace(result, images=(long, result.images[1])), settings)
    assert {row["problem"] for row in rows} == {""}
    assert len(list((tmp_path / "out" / "maps").rglob("*.png"))) == 2


def test_each_image_keeps_its_own_map_and_problem_whatever_the_number_of_threads(
    category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = score_settings()
    drawn = [ExampleImage(f"{number:02d}", None, number / 20, peak=number / 10) for number in range(9)]
    result = category("parts", drawn, settings)
    for image in result.images:
        if image.id in {"02", "07"}:
            image.path.unlink()
    outputs = []
    for threads in (1, 4):
        monkeypatch.setattr(maps, "DRAWING_THREADS", threads)
        out = tmp_path / str(threads)
        rows = write(out, result, settings)
        assert [row["id"] for row in rows] == [f"{number:02d}" for number in reversed(range(9))]
        assert {row["id"] for row in rows if row["problem"]} == {"02", "07"}
        files = sorted(path for path in out.rglob("*") if path.suffix in {".png", ".tiff", ".json"})
        outputs.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert sum(name.startswith("maps/") for name in outputs[0]) == 9 + 7
    assert outputs[0] == outputs[1]
