"""The page of a case: what it stores of a scan, and what a browser shows of it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medad.reporting.page import png_uri
from medad.reports.viewer.page import PrintedPicture, render_case
from medad.reports.viewer.volume import BYTE_KNOTS, HU_KNOTS, ShownVolume, shown_volume
from tests.browser import OpenPage, assert_sound, needs_browser, opened
from tests.medad.organ.torso import Torso, make_torso
from tests.page import Page

ROWS: list[dict[str, Any]] = [
    {"id": 1, "volume_mm3": 8000.0, "diameter_mm": 30.5, "mean_hu": 45.2, "mean_probability": 0.8},
    {"id": 2, "volume_mm3": 500.0, "diameter_mm": 9.0, "mean_hu": None, "mean_probability": 0.6},
]


@pytest.fixture(scope="module")
def torso() -> Torso:
    return make_torso()


@pytest.fixture(scope="module")
def masks(torso: Torso) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return a prediction with a large and a small lesion, and a truth that has the large one only."""
    x, y, z = (int(index) for index in np.argwhere(torso.liver).mean(0))
    prediction = np.zeros_like(torso.liver)
    prediction[x - 3 : x + 3, y - 3 : y + 3, z - 2 : z + 3] = True
    truth = prediction.copy()
    prediction[x + 8 : x + 10, y : y + 2, z : z + 2] = True
    return prediction, truth


@pytest.fixture(scope="module")
def shown(torso: Torso, masks: Any) -> ShownVolume:
    prediction, truth = masks
    return shown_volume(torso.hu, torso.liver, prediction, truth, torso.liver * np.float32(0.5), torso.spacing_mm)


def test_bytes_give_the_hu_back_within_half_a_step(torso: Torso, shown: ShownVolume) -> None:
    hu = np.interp(shown.grey[shown.liver], BYTE_KNOTS, HU_KNOTS)
    assert np.abs(hu - torso.hu[torso.liver]).max() <= 0.5 * 500 / 179 + 1e-3
    assert shown.liver.sum() == torso.liver.sum()
    assert set(np.unique(shown.lesions)) == {0, 1, 2}
    assert (shown.lesions == 1).sum() > (shown.lesions == 2).sum(), "the largest is the first"
    assert shown.probability.max() == 128
    assert not shown.probability[~shown.liver].any()


def test_many_voxels_are_averaged_within_planes(torso: Torso, masks: Any) -> None:
    prediction, truth = masks
    scores = torso.liver * np.float32(0.5)
    half = shown_volume(torso.hu, torso.liver, prediction, truth, scores, torso.spacing_mm, most_voxels=100_000)
    assert half.grey.size <= 100_000
    assert half.grey.shape[2] == torso.hu.shape[2], "planes are kept"
    step = half.spacing_mm[0] / torso.spacing_mm[0]
    assert step >= 2
    assert half.liver.sum() * step**2 == pytest.approx(torso.liver.sum(), rel=0.1)


def write_page(folder: Path, shown: ShownVolume, case_id: str = "ct-1") -> Path:
    path = folder / "ct-1.html"
    path.write_text(render_case(case_id, shown, ROWS, "../report.html"), encoding="utf-8")
    return path


def test_the_page_holds_the_volumes_and_nothing_from_elsewhere(shown: ShownVolume, tmp_path: Path) -> None:
    text = write_page(tmp_path, shown, "<script>alert(1)</script>").read_text(encoding="utf-8")
    found = {
        name: np.frombuffer(gzip.decompress(base64.b64decode(content)), np.uint8).reshape(shown.grey.shape, order="F")
        for name, content in re.findall(r'id="data-(\w+)">([^<]*)<', text)
    }
    np.testing.assert_array_equal(found["grey"], shown.grey)
    np.testing.assert_array_equal(found["lesions"], shown.lesions)
    np.testing.assert_array_equal(found["flags"] & 1, shown.liver)
    np.testing.assert_array_equal(found["flags"] >> 1, shown.truth)
    meta = json.loads(re.findall(r'id="meta">(.*?)</script>', text)[0])
    assert [shown.lesions[tuple(place)] for place in meta["places"]] == [1, 2]
    assert meta["marks"]["differs"] == sorted(set(np.argwhere(shown.lesions == 2)[:, 2].tolist()))
    assert "alert(1)</script>" not in text
    assert "://" not in Page.without_data(text)


# in a browser

SHOWN = "document.getElementById('state').textContent"
READY = """
while (!document.getElementById('state').textContent.startsWith('Slice')) {
  await new Promise((done) => setTimeout(done, 20));
}
window.frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 20)));
window.pixels = (id) => {
  const canvas = document.getElementById(id);
  return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data];
};
window.orange = (id) => {
  const p = pixels(id);
  let count = 0;
  for (let i = 0; i < p.length; i += 4) count += p[i] > 200 && p[i + 1] > 120 && p[i + 1] < 190 && p[i + 2] < 60;
  return count;
};
await frame();
"""


@pytest.fixture
def browser(shown: ShownVolume, tmp_path: Path) -> Iterator[OpenPage]:
    with opened(write_page(tmp_path, shown), tmp_path) as page:
        page.ask(READY)
        yield page
        assert page.problems == []


@needs_browser
def test_slider_keys_and_wheel_change_the_slice(browser: OpenPage) -> None:
    slide = "slider.value = 5; slider.dispatchEvent(new Event('input'));"
    key = "axial.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowUp', bubbles: true }));"
    wheel = "axial.dispatchEvent(new WheelEvent('wheel', { deltaY: -1, cancelable: true }));"
    find = "const [slider, axial] = ['slice', 'axial'].map((id) => document.getElementById(id));"
    seen = [
        browser.ask(f"{find} {act} await frame(); return [{SHOWN}, pixels('axial').join()];")
        for act in (slide, key, wheel)
    ]
    assert [int(re.findall(r"Slice (\d+)", text)[0]) for text, _ in seen] == [5, 6, 7]
    assert len({image for _, image in seen}) == 3


@needs_browser
def test_a_lesion_is_found_from_the_table_and_the_table_from_the_image(browser: OpenPage, shown: ShownVolume) -> None:
    text, current, drawn = browser.ask(f"""
        document.querySelectorAll('[data-place]')[1].click(); await frame();
        const current = [...document.querySelectorAll('#lesions tbody tr')].map((row) => row.ariaCurrent);
        return [{SHOWN}, current, orange('axial') > 0];
    """)
    planes = set(np.argwhere(shown.lesions == 2)[:, 2].tolist())
    assert int(re.findall(r"Slice (\d+)", text)[0]) in planes
    assert "lesion 2." in text
    assert current == ["false", "true"]
    assert drawn


@needs_browser
def test_overlays_and_windows_change_pixels(browser: OpenPage) -> None:
    find = "const box = document.getElementById('show-lesions');"
    hide = f"{find} box.checked = false; box.dispatchEvent(new Event('input'));"
    before = browser.ask("return orange('axial');")
    without = browser.ask(f"{hide} await frame(); return orange('axial');")
    assert before > 0
    assert without == 0
    image = browser.ask("return pixels('axial').join();")
    other, pressed, low = browser.ask("""
        document.dispatchEvent(new KeyboardEvent('keydown', { key: '4' })); await frame();
        const button = document.querySelector('[data-window="Bone"]');
        return [pixels('axial').join(), button.ariaPressed, document.getElementById('low').value];
    """)
    assert image != other
    assert (pressed, low) == ("true", "-500")


@needs_browser
def test_an_address_with_a_lesion_opens_at_it(browser: OpenPage, shown: ShownVolume) -> None:
    text = browser.ask(f"location.hash = '#lesion-2'; await frame(); await frame(); return {SHOWN};")
    assert int(re.findall(r"Slice (\d+)", text)[0]) in set(np.argwhere(shown.lesions == 2)[:, 2].tolist())
    assert "lesion 2." in text


@needs_browser
def test_paper_shows_the_pictures_of_the_report_or_the_planes_as_they_are(shown: ShownVolume, tmp_path: Path) -> None:
    pictures = [PrintedPicture("Best slice, z = 3", png_uri(Image.new("RGB", (8, 4))))]
    with_pictures, without = tmp_path / "with.html", tmp_path / "without.html"
    with_pictures.write_text(render_case("ct-1", shown, ROWS, "../report.html", pictures), encoding="utf-8")
    without.write_text(render_case("ct-1", shown, ROWS, "../report.html"), encoding="utf-8")
    seen = (
        "return ['.viewer', '.paper', '.controls'].map((name) => document.querySelector(name))"
        ".map((each) => Boolean(each && getComputedStyle(each).display !== 'none'));"
    )
    with opened(with_pictures, tmp_path, width=360) as page:
        page.ask(READY)
        assert_sound(page)
        assert page.ask(seen) == [True, False, True]
        page.send("Emulation.setEmulatedMedia", media="print")
        assert page.ask(seen) == [False, True, False]
        page.go(without)
        assert page.ask(seen) == [True, False, False]


@needs_browser
def test_a_distance_is_measured_in_mm(browser: OpenPage, shown: ShownVolume) -> None:
    found = browser.ask("""
        document.getElementById('measure').click();
        const axial = document.getElementById('axial'), rect = axial.getBoundingClientRect();
        axial.setPointerCapture = () => {};
        const at = (type, x) => axial.dispatchEvent(new PointerEvent(type, {
          pointerId: 1, clientX: rect.left + x * rect.width, clientY: rect.top + rect.height / 2,
        }));
        at('pointerdown', 0.25); at('pointermove', 0.75); at('pointerup', 0.75);
        return document.getElementById('distance').textContent;
    """)
    half = 0.5 * shown.grey.shape[0] * shown.spacing_mm[0]
    assert float(found.removesuffix(" mm")) == pytest.approx(half, abs=shown.spacing_mm[0])
