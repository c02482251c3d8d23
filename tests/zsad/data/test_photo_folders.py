"""Check folders of photographs as people have them: odd names, odd files, odd pixels, and masks among the images."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from medad.base.errors import InputError
from zsad.config.run import ImagesSettings
from zsad.data.datasets import find_categories, unlabelled_images
from zsad.data.images import AVIF_SUFFIXES, HEIC_SUFFIXES, read_image
from zsad.data.listing import files_in, images_below
from zsad.data.pixel_notes import is_uniform, pixel_notes

Array = NDArray[Any]
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(256))


def photo(height: int = 24, width: int = 32) -> Array:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo()).save(root / name)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def ids(root: Path) -> list[str]:
    return [item.id for item in unlabelled_images([root])[0].items]


def sentence(root: Path) -> str:
    return unlabelled_images([root])[2].sentence


def test_skipped_files_are_counted_by_ending_and_junk_is_not(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", *(f"day/{n}.HEIC" for n in range(10)), "day/clip.mp4", "no_ending", "v1.2 final copy")
    touch(tmp_path, "Thumbs.db", "day/.DS_Store", "desktop.ini", "._a.png", "@eaDir/a.png", "__MACOSX/a.png")
    category, problems, left_out = unlabelled_images([tmp_path])
    assert [item.id for item in category.items] == ([f"day/{n}" for n in range(10)] if HEIC_SUFFIXES else []) + ["a"]
    assert not problems
    if not HEIC_SUFFIXES:
        assert left_out.endings == {".heic": 10, ".mp4": 1, "no ending": 1, "other endings": 1}
        assert left_out.sentence.startswith("Left out: 10 x .heic, 1 x .mp4, ")
        assert "pip install 'adflows[heic]'" in left_out.sentence


def test_a_folder_without_an_image_says_what_lies_there(tmp_path: Path) -> None:
    touch(tmp_path, "a.gif", "b.gif", "c.mp4")
    with pytest.raises(InputError, match=r"no image in this folder .*; left out: 2 x \.gif, 1 x \.mp4"):
        unlabelled_images([tmp_path])


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPE", "jpeg"])
def test_all_endings_of_jpeg_are_read(tmp_path: Path, ending: str) -> None:
    Image.new("RGB", (16, 12), (200, 100, 50)).save(tmp_path / f"a.{ending}", format="JPEG", quality=95)
    assert ids(tmp_path) == ["a"]
    found = read_image(tmp_path / f"a.{ending}")
    assert np.abs(found.astype(int) - (200, 100, 50)).max() <= 3
    assert pixel_notes(tmp_path / f"a.{ending}", photo()) == ()


def test_a_name_that_is_not_utf_8_gets_a_readable_id(tmp_path: Path) -> None:
    for name in (b"bad\xff\xfe.png", b"gr\xfcn.png", "grün.png".encode(), b"old\x81.png"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:  # noqa: PTH123
            Image.fromarray(photo()).save(file, format="PNG")
    assert set(ids(tmp_path)) == {"badÿþ", "grün", "grün-2", "old\ufffd"}
    "".join(ids(tmp_path)).encode()


def test_odd_names_are_kept(tmp_path: Path) -> None:
    names = ["with space", "零件", "=cmd|calc!A1", "-rf", "%41", "#hash?", "comma,semi;", "dots.v1.2", "new\nline"]
    put(tmp_path, *(f"{name}.png" for name in names), "folder.png/in.png")
    assert set(ids(tmp_path)) == {*names, "folder.png/in"}


def test_linked_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "photos", tmp_path / "disk"
    touch(root, "a/1.png")
    touch(elsewhere, "2.png", "deep/3.png")
    touch(tmp_path, "not_ours.png")
    (root / "a/back").symlink_to(root)
    (root / "above").symlink_to(tmp_path)
    (root / "again").symlink_to(root / "a")
    (root / "link").symlink_to(elsewhere)
    (root / "same").symlink_to(elsewhere)
    (elsewhere / "home").symlink_to(root)
    assert [path.as_posix() for path in images_below(root)] == ["a/1.png", "link/2.png", "link/deep/3.png"]
    assert "5 repeated folder links" in sentence(root)
    assert "Followed 1 linked folder." in sentence(root)


def test_a_linked_folder_may_be_given_itself(tmp_path: Path) -> None:
    touch(tmp_path, "disk/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert ids(tmp_path / "link") == ["1"]


def test_pipes_sockets_and_broken_links_are_passed_over_without_waiting(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket is limited to about 100 characters
        try:
            server.bind("s.png")
        finally:
            os.chdir(here)
        assert ids(tmp_path) == ["a"]
        assert sentence(tmp_path) == "Left out: 1 broken link, 1 pipe, 1 socket."
        assert [path.name for path in files_in(tmp_path, (".png",))] == ["a.png"]
    category, problems, _ = unlabelled_images([tmp_path / "a.png", tmp_path / "pipe.png", tmp_path / "none.png"])
    assert [item.id for item in category.items] == ["a"]
    assert [one.rule for one in problems] == ["is a pipe, not an image file", "no such file or folder"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("zero.jpg", b"", "is empty"),
        ("nul.jpg", b"\0" * 4096, "zero bytes"),
        ("html.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "is an HTML page"),
        ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "is a Git LFS pointer"),
        ("annex.png", b"/annex/objects/SHA256E-s1--00.png\n", "is a git-annex pointer"),
        ("video.jpg", b"\0\0\0\x20ftypisom\0\0\0\0isomavc1" + b"\1" * 99, "is a video"),
        ("clip.png", b"\x1a\x45\xdf\xa3" + b"\1" * 99, "is a video"),
        ("doc.png", b"%PDF-1.7\n%\xe2\xe3\n", "is a PDF"),
        ("jp2.png", b"\0\0\0\x0cjP  \r\n\x87\n" + b"\1" * 99, "is a JPEG 2000"),
        ("drawing.png", b"<?xml version='1.0'?><svg/>", "is an SVG"),
        ("zip.png", b"PK\3\4" + b"\1" * 99, "is a ZIP"),
        ("psd.png", b"8BPS\0\1" + b"\1" * 99, "is a Photoshop"),
        ("dicom.png", b"\0" * 127 + b"\1DICM" + b"\1" * 99, "is a DICOM"),
        ("words.png", b"hello there\n", "but a text file"),
        ("noise.png", b"\x8f\xe0\x17" * 40, "not a PNG"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_a_file_that_is_not_what_its_ending_says_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / name)
    assert said in caught.value.rule
    assert "\n" not in str(caught.value)


def test_a_gif_and_a_heic_under_another_name_are_named(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "a.png", format="GIF")
    with pytest.raises(InputError, match="is a GIF; save it as PNG"):
        read_image(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(HEIC)
    with pytest.raises(InputError, match="is a HEIC photograph" if not HEIC_SUFFIXES else "broken|HEIC"):
        read_image(tmp_path / "b.jpg")


@pytest.mark.skipif(not AVIF_SUFFIXES, reason="this Pillow does not read AVIF")
def test_avif_is_read_and_its_wrong_ending_noted(tmp_path: Path) -> None:
    plain = Image.new("RGB", (32, 24), (200, 100, 50))
    for name in ("a.avif", "b.jpg"):
        plain.save(tmp_path / name, format="AVIF", quality=95)
        assert np.abs(read_image(tmp_path / name).astype(int) - (200, 100, 50)).max() <= 6
    assert ids(tmp_path) == ["a", "b"]
    assert pixel_notes(tmp_path / "a.avif", photo()) == ()
    assert pixel_notes(tmp_path / "b.jpg", photo()) == ("Read as AVIF, which is not what the ending .jpg says",)


def notes(path: Path) -> tuple[str, ...]:
    return pixel_notes(path, read_image(path))


GREY = np.random.default_rng(1).integers(0, 256, (24, 32), dtype=np.uint16)


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize(("bits", "said"), [(12, "only 12 of its 16 bits"), (14, "only 14"), (8, "8 of its 16 bits")])
def test_unused_bits_are_noted(tmp_path: Path, ending: str, bits: int, said: str) -> None:
    values = GREY << (bits - 8)
    values[0, 0] = (1 << bits) - 1
    path = tmp_path / f"a.{ending}"
    tifffile.imwrite(path, values) if ending == "tif" else Image.fromarray(values).save(path)
    assert any(said in note for note in notes(path))
    tifffile.imwrite(tmp_path / "rgb.tif", np.dstack([values] * 3), photometric="rgb")
    assert any(said in note for note in notes(tmp_path / "rgb.tif"))


def test_sixteen_used_bits_are_not_noted(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY << 8)
    Image.fromarray(photo()).save(tmp_path / "b.png")
    assert notes(tmp_path / "a.tif") == notes(tmp_path / "b.png") == ()


def write_thumbnail_first(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        file.write(photo()[::4, ::4].copy(), photometric="rgb")
        file.write(photo(), photometric="rgb")


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("a.tif", lambda p: tifffile.imwrite(p, np.stack([photo()] * 2), photometric="rgb"), "2 pages or frames"),
        ("a.tif", write_thumbnail_first, "much smaller (8 x 6 pixels) than another (32 x 24)"),
        (
            "a.tif",
            lambda p: tifffile.imwrite(p, np.moveaxis(photo(), 2, 0), imagej=True, metadata={"axes": "CYX"}),
            "3 channels as pages",
        ),
        (
            "a.png",
            lambda p: Image.fromarray(photo()).save(
                p, save_all=True, append_images=[ImageOps.invert(Image.fromarray(photo()))]
            ),
            "2 pages or frames; the first was read",
        ),
    ],
    ids=["two pages", "thumbnail first", "channels", "animation"],
)
def test_several_pages_are_noted_and_the_first_is_read(
    tmp_path: Path, name: str, write: Callable[[Path], Any], said: str
) -> None:
    write(tmp_path / name)
    (found,) = notes(tmp_path / name)
    assert said in found


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_almost_uniform_frame_is_noted(tmp_path: Path, value: int) -> None:
    frame = np.full((60, 80), value, dtype=np.uint8)
    frame[0, :10] = 60  # a few hot pixels
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert notes(tmp_path / "a.png") == ("Almost uniform frame, in which there is nothing to compare",)


def test_a_dark_image_with_content_is_not_uniform() -> None:
    assert not is_uniform((photo(60, 80) // 16).astype(np.uint8))
    large = np.zeros((2000, 3000, 3), dtype=np.uint8)
    assert is_uniform(large)
    large[500:700, 500:900] = 90
    assert not is_uniform(large)


def test_masks_and_training_images_are_not_photographs(tmp_path: Path) -> None:
    touch(tmp_path, "can/train/good/0.png", "can/validation/good/0.png", "can/test_private/0.png")
    touch(tmp_path, *(f"can/test_public/{name}.png" for name in ("good/0", "bad/1", "ground_truth/bad/1_mask")))
    assert ids(tmp_path) == ["can/test_private/0", "can/test_public/bad/1", "can/test_public/good/0"]
    assert sentence(tmp_path) == "Left out: 1 image in ground_truth/, 1 image in train/, 1 image in validation/."


@pytest.mark.parametrize("place", ["out", "good/out"])
def test_the_results_of_a_run_are_not_photographs(tmp_path: Path, place: str) -> None:
    touch(tmp_path, "good/0.png", "bad/1.png", f"{place}/maps/0.png", f"{place}/flagged/1.png", f"{place}/preview.png")
    (tmp_path / place / "manifest.json").write_text('{"schema": "adflows run 1"}', encoding="utf-8")
    assert ids(tmp_path) == ["bad/1", "good/0"]
    assert sentence(tmp_path) == "Left out: 1 folder of results."
    [category], failures, left_out = find_categories(ImagesSettings(root=str(tmp_path)))
    assert not failures
    assert {item.id: item.anomalous for item in category.items} == {"bad/1": True, "good/0": False}
    assert left_out.sentence == "Left out: 1 folder of results."


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["test/hole/rgb/0.png", "test/hole/gt/0.png", "test/hole/xyz/0.tiff"], ["test/hole/rgb/0"]),
        (["images/train/0.png", "images/test/1.png", "labels/x.png"], ["images/test/1"]),
        (["normal/0.png", "abnormal/1.png", "mask/abnormal/1.png"], ["abnormal/1", "normal/0"]),
        (["Data/Images/Normal/0.JPG", "Data/Masks/Anomaly/0.png"], ["Normal/0"]),
        (["OK/S1/a.jpg", "NG/X/S2/b.jpg", "NG/X/S2/b.png"], ["NG/X/S2/b", "OK/S1/a"]),
        (["a.png", "a_mask.png", "b.png", "B_GT.png"], ["a", "b"]),
        (["masks/a.png", "masks/b.png"], ["masks/a", "masks/b"]),
        (["train/1.png", "plane/2.png"], ["plane/2", "train/1"]),
        (["labels/1.png", "boxes/2.png"], ["boxes/2", "labels/1"]),
        (["1.jpg", "1.png"], ["1.jpg", "1.png"]),
    ],
    ids=["3d", "yolo", "anomalib", "visa", "real-iad", "beside", "only masks", "trains", "labels", "two formats"],
)
def test_photographs_of_known_layouts(tmp_path: Path, names: list[str], wanted: list[str]) -> None:
    touch(tmp_path, *names)
    assert ids(tmp_path) == wanted


def test_a_mask_beside_a_photograph_of_the_same_name_has_two_values(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        Image.fromarray(photo()).save(tmp_path / name)
    mask = np.zeros((24, 32), dtype=np.uint8)
    mask[4:9] = 255
    Image.fromarray(mask).save(tmp_path / "b.png")
    assert ids(tmp_path) == ["a.jpg", "a.png", "b"]
    assert sentence(tmp_path) == "Left out: 1 mask beside its image."


@pytest.mark.data
def test_the_case_of_two_hundred_photographs(tmp_path: Path, real_data: Path) -> None:
    script = real_data.parent / "cases" / "images" / "user200.py"
    if not script.is_file():
        pytest.skip(f"no script {script}")
    environment = {**os.environ, "DATA": str(real_data)}
    subprocess.run([sys.executable, script, tmp_path / "u"], env=environment, check=True, capture_output=True)
    category, problems, left_out = unlabelled_images([tmp_path / "u/photos line 2"])
    assert not problems
    assert left_out.endings == ({".mp4": 1} if HEIC_SUFFIXES else {".heic": 10, ".mp4": 1})
    names = [line.split(",", 1)[1] for line in (tmp_path / "u/truth.txt").read_text(encoding="utf-8").splitlines()]
    found = [item.path.relative_to(tmp_path / "u/photos line 2").as_posix() for item in category.items]
    assert not Counter(names) - Counter(found)


@pytest.mark.data
def test_every_case_file_with_a_reference_is_read_exactly(tmp_path: Path, real_data: Path) -> None:
    script = real_data.parent / "cases" / "images" / "files.py"
    if not script.is_file():
        pytest.skip(f"no script {script}")
    source = next((real_data / "industrial/hazelnut_toy/test/good").iterdir())
    subprocess.run([sys.executable, script, source, tmp_path / "o", tmp_path / "r"], check=True, capture_output=True)
    references = sorted((tmp_path / "r").iterdir())
    assert len(references) > 20
    for reference in references:
        np.testing.assert_array_equal(read_image(tmp_path / "o" / reference.stem), np.load(reference), reference.stem)
    assert "1 pipe" in sentence(tmp_path / "o")
