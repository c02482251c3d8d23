"""The gallery of a report: what it stores of each image, and what a browser does with it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import OpenPage, assert_sound, needs_browser, opened
from tests.page import Page
from tests.zsad.scored_sets import ExampleImage, usual, write_category, zsad_settings
from zsad.config.run import EvaluationSettings, ImagesSettings, ScoreSettings
from zsad.config.settings import ZsadSettings
from zsad.reports.run import gallery
from zsad.reports.run.report import write_report

THRESHOLD = 0.55
HOSTILE = "<script>alert('x')<!--& \"quoted\""


def settings(**changes: Any) -> ZsadSettings:
    """Return settings with which an image's score is its class score."""
    values: dict[str, Any] = {
        "seeds": (0,),
        "score": ScoreSettings(variants=("text",)),
        "evaluation": EvaluationSettings(threshold=THRESHOLD),
    }
    return zsad_settings(**(values | changes))


def write(root: Path, images: list[ExampleImage], *names: str, **changes: Any) -> Path:
    """Write the report of categories with the same images. Return its folder."""
    used, out = settings(**changes), root / "report"
    out.mkdir()
    categories = [write_category(root / "in", name, images, used) for name in names or ("nut",)]
    write_report(out, settings=used, categories=categories, failures=[], versions={}, notes=[])
    return out


def parts(page: Path) -> Any:
    [data] = Page(page.read_text(encoding="utf-8")).data
    return json.loads(data)


def test_every_image_is_there_with_its_score_picture_and_map(tmp_path: Path) -> None:
    [part] = parts(write(tmp_path, usual()) / "report.html")
    images = part["images"]
    assert (part["category"], part["threshold"], len(images)) == ("nut", THRESHOLD, 10)
    assert [image["score"] for image in images] == sorted((image["score"] for image in images), reverse=True)
    best = images[0]
    assert (best["id"], best["folder"], best["anomalous"]) == ("scratch/3", "scratch", True)
    assert best["score"] == pytest.approx(0.81)
    assert best["full"] == "maps/nut/scratch/3.png"
    levels = np.asarray(_opened(best["map"]))
    assert max(levels.shape) <= gallery.MAP_SIDE_PX
    peak = np.unravel_index(levels.argmax(), levels.shape)
    high, wide = (peak[axis] / levels.shape[axis] for axis in (0, 1))
    assert 0.25 <= high <= 0.5, "the defect's rows are 16 to 32 of 64"
    assert 0.25 <= wide <= 0.75
    assert _opened(best["picture"]).size == (64, 64)


def _opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize("budget", [14_000, 4_000])
def test_a_picture_and_its_map_fit_into_their_bytes(
    tmp_path: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 700, 3), dtype=np.uint8)
    monkeypatch.setattr(gallery, "read_image", lambda path: noise)
    monkeypatch.setattr(gallery, "LEAST_BYTES", budget)
    monkeypatch.setattr(gallery, "MOST_BYTES", budget)
    [part] = parts(write(tmp_path, usual(2, 1)) / "report.html")
    for image in part["images"]:
        assert 3 * (len(image["picture"]) + len(image["map"])) / 4 <= budget + 100
        assert image["size"][0] / image["size"][1] == pytest.approx(7 / 9, abs=0.05)


def test_more_images_than_a_page_may_have_get_pages_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "PAGE_IMAGES", 6)
    out = write(tmp_path, usual(), "nut", "bolt")
    links = [link for link in Page((out / "report.html").read_text(encoding="utf-8")).links if "gallery/" in link]
    assert links == [f"gallery/{number}.html" for number in (1, 2, 3, 4)]
    pages = [parts(out / link)[0] for link in links]
    assert [page["category"] for page in pages] == ["bolt, 1 to 6", "bolt, 7 to 10", "nut, 1 to 6", "nut, 7 to 10"]
    assert [len(page["images"]) for page in pages] == [6, 4, 6, 4]
    assert pages[0]["images"][0]["full"] == "../maps/bolt/scratch/3.png", "from the page's folder"
    assert 'href="../report.html"' in (out / links[0]).read_text(encoding="utf-8")


def test_without_labels_no_metric_is_defined_and_the_prompts_are_shown(tmp_path: Path) -> None:
    out = write(tmp_path, [ExampleImage(f"x{i}", None, i / 10) for i in range(5)])
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "Deployable threshold" in page.labels[-1]
    assert not any("AUROC" in label or "AUPRO" in label for label in page.labels)
    assert "the object is called “nut”; 1 normal and 2 anomalous texts." in page.words
    assert "a broken nut; a torn nut" in page.words


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenPage]:
    root = tmp_path_factory.mktemp("gallery")
    out = write(root, usual(), "nut", HOSTILE.replace("/", ""))
    with opened(out / "report.html", root, width=900) as found:
        yield found


TILES = "[...document.querySelectorAll('.tile')].map((tile) => tile.lastChild.textContent)"
COUNT = "document.getElementById('g-count').textContent"


def change(name: str, value: str, event: str = "change") -> str:
    return (
        f"const input = document.getElementById('g-{name}'); input.value = {json.dumps(value)};"
        f"input.dispatchEvent(new Event('{event}'));"
    )


@needs_browser
def test_all_images_are_ranked_and_the_threshold_recounts(page: OpenPage) -> None:
    page.ask("while (!document.getElementById('g-tiles').dataset.ready) await new Promise(requestAnimationFrame);")
    page.ask(change("category", "1"))
    assert page.ask(f"return {TILES}")[:4] == ["scratch/3", "scratch/2", "scratch/1", "good/5"]
    start = "4 of 10 images flagged at 0.55 or more; 3 of 4 anomalous ones found; 1 of 6 normal ones flagged. 10 shown."
    assert page.ask(f"return {COUNT}") == start
    page.ask(change("slider", "0.35", "input"))
    moved = page.ask(f"return {COUNT}")
    assert moved.startswith("7 of 10 images flagged at 0.35"), moved
    assert page.ask("return document.querySelectorAll('.tile[data-flagged=true] .flag').length") == 7
    assert page.ask("return document.getElementById('g-threshold').value") == "0.35"
    page.ask("document.getElementById('g-reset').click()")
    assert page.ask(f"return {COUNT}") == start
    assert page.problems == []


@needs_browser
def test_filters_and_orders(page: OpenPage) -> None:
    page.ask(change("category", "1") + "document.getElementById('g-folder').value = '/good';")
    page.ask(change("order", "up"))
    assert page.ask(f"return {TILES}") == [f"good/{i}" for i in range(6)]
    page.ask(change("flagged", "true"))
    assert page.ask(f"return {TILES}") == ["good/5"]
    page.ask("document.getElementById('g-save').click()")
    saved = page.ask("return document.getElementById('g-save').dataset.saved")
    # the score is a float32
    assert saved == 'id,score,flagged,label\n"good/5",0.6000000238418579,1,normal\n'
    page.ask(change("folder", "") + "document.getElementById('g-flagged').value = '';")
    page.ask(change("label", "true"))
    assert page.ask(f"return {TILES}") == [f"scratch/{i}" for i in range(4)]
    page.ask("document.getElementById('g-low').value = '0.6';")
    page.ask(change("high", "0.75"))
    assert page.ask(f"return {TILES}") == ["scratch/1", "scratch/2"]
    page.ask("for (const id of ['low', 'high', 'label']) document.getElementById(`g-${id}`).value = '';")
    page.ask(change("order", "down"))
    assert len(page.ask(f"return {TILES}")) == 10
    assert page.problems == []


@needs_browser
def test_the_heat_map_comes_with_focus_and_the_dialog_works_by_keys_alone(page: OpenPage) -> None:
    page.ask(change("category", "1") + "document.querySelector('.tile').focus();")
    page.ask("while (!document.querySelector('.tile canvas')) await new Promise(requestAnimationFrame);")
    page.press("Enter")
    wait = "await new Promise((done) => setTimeout(done, 200));"
    assert page.ask("return document.getElementById('g-title').textContent") == "scratch/3"
    reddest = (
        f"{wait} const map = document.getElementById('g-map');"
        "const pixel = (x, y) => [...map.getContext('2d').getImageData(x * map.width, y * map.height, 1, 1).data];"
        "return [pixel(0.5, 0.375), pixel(0.5, 0.9)];"
    )
    inside, outside = page.ask(reddest)
    assert sum(inside[:3]) > 3 * sum(outside[:3]), "the defect is bright, the rest is black"
    page.press("ArrowRight")
    assert page.ask("return document.getElementById('g-title').textContent") == "scratch/2"
    assert "rank 2 of 10" in page.ask("return document.getElementById('g-facts').textContent")
    page.press("+")
    zoomed = "return document.querySelector('#g-picture img').style.transform"
    assert page.ask(zoomed) == "translate(0px, 0px) scale(1.5)"
    page.press("0")
    assert page.ask(zoomed) == "translate(0px, 0px) scale(1)"
    page.press("Escape")
    assert page.ask("return document.getElementById('g-dialog').open") is False
    page.press("h")
    assert page.ask(f"{wait} return document.querySelectorAll('.tile canvas').length") == 10
    page.press("h")
    assert page.ask(f"{wait} return document.querySelectorAll('.tile canvas').length") <= 1
    assert page.problems == []


@needs_browser
def test_hostile_names_stay_text(page: OpenPage) -> None:
    page.ask(change("category", "0"))
    option = page.ask("return document.querySelector('#g-category option').textContent")
    assert option == HOSTILE.replace("/", "")
    assert page.problems == []


@needs_browser
def test_one_image_and_none(tmp_path: Path) -> None:
    out = write(tmp_path, [ExampleImage("x", None, 0.5)], data=ImagesSettings(root="samples:x", category="nut"))
    with opened(out / "report.html", tmp_path, width=360) as found:
        found.ask("while (!document.getElementById('g-tiles').dataset.ready) await new Promise(requestAnimationFrame);")
        assert found.ask(f"return {TILES}") == ["x"]
        assert_sound(found)
    empty = tmp_path / "empty"
    empty.mkdir()
    write_report(empty, settings=settings(), categories=[], failures=[], versions={}, notes=[])
    with opened(empty / "report.html", tmp_path) as found:
        assert found.ask("return document.getElementById('gallery')") is None
        assert found.problems == []
