"""Check reading of images and masks, error messages, crops, and merging of maps."""

from __future__ import annotations

import itertools
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.functional import to_tensor

from medad.base.errors import InputError
from zsad.data.images import (
    Crops,
    crop_image,
    map_in_threads,
    mask_to_canvas,
    merge_maps,
    plan_crops,
    read_image,
    read_map,
    resize_map,
    scaled_hw,
    write_png,
)
from zsad.data.masks import read_mask

Array = NDArray[Any]

ORIENTATION = 274


def colours(height: int = 12, width: int = 9) -> Array:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def refused(path: Path, **options: Any) -> str:
    """Return the rule of the error that `read_image` raises. Check that the message is one line with the path once."""
    with pytest.raises(InputError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(str(path)) == 1
    return caught.value.rule


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.jpg.png"])
def test_lossless_colour_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    image = colours()
    Image.fromarray(image).save(tmp_path / name, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / name), image)


def test_jpeg_comes_back_nearly(tmp_path: Path) -> None:
    image = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - image).max() <= 3


def test_the_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    Image.fromarray(colours()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), colours())


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA"])
def test_grey_and_palettes_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.where(np.arange(30).reshape(5, 6) % 3 == 0, 255, 0).astype(np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_transparent_images_lie_on_white(tmp_path: Path, ending: str) -> None:
    image = colours()
    alpha = np.full(image.shape[:2], 255, dtype=np.uint8)
    alpha[:5] = 0
    Image.fromarray(np.dstack([image, alpha])).save(tmp_path / f"a.{ending}", lossless=True)
    found = read_image(tmp_path / f"a.{ending}")
    assert (found[:5] == 255).all()
    np.testing.assert_array_equal(found[5:], image[5:])


def test_a_transparent_palette_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    found = read_image(tmp_path / "a.png")
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[2, 3].tolist() == [40, 50, 60]


SIXTEEN = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], dtype=np.uint16)
UPPER = np.array([[0, 0, 1], [0x12, 0xFF, 0xFF]], dtype=np.uint8)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: tifffile.imwrite(path, SIXTEEN),
        lambda path: tifffile.imwrite(path, SIXTEEN, byteorder=">"),
        lambda path: tifffile.imwrite(path, SIXTEEN, compression="zlib"),
        lambda path: tifffile.imwrite(path, np.dstack([SIXTEEN] * 3), photometric="rgb"),
        lambda path: Image.fromarray(SIXTEEN).save(path, format="PNG"),
    ],
    ids=["grey tiff", "big endian", "deflated", "colour tiff", "png"],
)
def test_the_upper_eight_of_sixteen_bits_are_read(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.dstack([UPPER] * 3))


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        (np.dstack([SIXTEEN] * 3).transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}, "planes"),
        (SIXTEEN, {"photometric": "miniswhite"}, "white as zero"),
        (SIXTEEN.astype(np.float32), {}, "32-bit float"),
        (SIXTEEN.astype(np.int32), {}, "32-bit integer"),
    ],
    ids=["planes", "inverted", "float", "integer"],
)
def test_pixels_without_a_known_meaning_are_refused(
    tmp_path: Path, values: Array, options: dict[str, Any], said: str
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    assert said in refused(tmp_path / "a.tif")


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, ending: str) -> None:
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:, 8:] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned, so a viewer turns the image clockwise
    Image.fromarray(upright).save(tmp_path / f"a.{ending}", exif=exif)
    found = read_image(tmp_path / f"a.{ending}")
    assert found.shape == (16, 8, 3)
    assert found[:7].max() < 10
    assert found[9:].min() > 245


def saved(tmp_path: Path, name: str) -> bytes:
    Image.fromarray(colours(40, 50)).save(tmp_path / name)
    return (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9])
def test_an_image_cut_short_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    whole = saved(tmp_path, name)
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    refused(tmp_path / name)


def test_any_flipped_bit_of_a_png_is_seen(tmp_path: Path) -> None:
    """Check a PNG that compresses well: without checksums, a flipped bit would only change its pixels."""
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(200, dtype=np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)).save(path)
    whole = path.read_bytes()
    for place in range(0, whole.rindex(b"IEND") - 4, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(path)


def png_of(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused_unopened(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png_of(side, side, b"\0" * 100))
    assert "pixels" in refused(tmp_path / "a.png")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello", encoding="utf-8")
    assert refused(tmp_path / "a.png").startswith("not a PNG")
    assert refused(tmp_path / "a.png").endswith("but a text file")
    (tmp_path / "a.png").write_bytes(b"\x8f\xe0" * 40)
    assert refused(tmp_path / "a.png").startswith("not a PNG")
    assert refused(tmp_path / "b.png") == "no such file or folder"
    assert refused(tmp_path) == "cannot be read (Is a directory)"


def test_the_shorter_side_has_a_least_length(tmp_path: Path) -> None:
    Image.fromarray(colours(1, 1)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (1, 1, 3)
    assert refused(tmp_path / "a.png", min_side_px=8) == "is 1 x 1 pixels; the shorter side must have at least 8"


def test_reading_in_threads_leaves_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    Image.fromarray(colours(200, 200)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read_image(tmp_path / "a.png") for _ in range(8)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize("value", [1, 128, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16", "1"])
def test_a_mask_is_what_is_not_black(tmp_path: Path, mode: str, value: int) -> None:
    truth = np.zeros((6, 7), dtype=bool)
    truth[2:4, 3:] = True
    grey = (truth * value).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16))
    elif mode == "P":
        image = Image.fromarray(truth.astype(np.uint8))
        image.putpalette([0, 0, 0, value, 0, 0])
    else:
        image = Image.fromarray(grey if mode != "1" else truth).convert(mode)
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (6, 7)), truth)


def test_a_palette_masks_colours_count_and_not_its_numbers(tmp_path: Path) -> None:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.putpixel((2, 1), 0)
    image.save(tmp_path / "m.png")
    assert np.argwhere(read_mask(tmp_path / "m.png", (2, 3))).tolist() == [[1, 2]]


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("L", (7, 6)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="the mask is 7 x 6 pixels, its image 6 x 7"):
        read_mask(tmp_path / "m.png", (7, 6))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 300))
@settings(max_examples=100)
def test_crops_cover_the_canvas_and_are_no_more_than_needed(height: int, width: int, size_px: int) -> None:
    crops = plan_crops(height, width, size_px, max_crops=10**9)
    assert min(crops.canvas_hw) == size_px
    assert (crops.canvas_hw[0] >= crops.canvas_hw[1]) == (height >= width) or min(crops.canvas_hw) == max(
        crops.canvas_hw
    )
    long = max(crops.canvas_hw)
    starts = [max(offset) for offset in crops.offsets]
    assert (starts[0], starts[-1]) == (0, long - size_px)
    assert all(0 < b - a <= size_px for a, b in itertools.pairwise(starts))
    assert len(starts) == (1 if long == size_px else max(2, -(-long // size_px)))
    gaps = np.diff(starts)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_visa_gets_the_papers_two_overlapping_crops() -> None:
    crops = plan_crops(1000, 1500, 240, max_crops=64)
    assert crops == Crops((240, 360), ((0, 0), (0, 120)), 240)


def test_an_image_too_long_is_named() -> None:
    assert len(plan_crops(800, 12_000, 240, max_crops=64).offsets) == 15
    with pytest.raises(InputError, match=r"line\.png: is 12000 x 50 pixels: so long that it needs 240 crops, limit 64"):
        plan_crops(50, 12_000, 240, max_crops=64, path=Path("line.png"))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squashed_image_is_one_crop_resized_as_torchvision_does(interpolation: str) -> None:
    image = colours(100, 163)
    crops = plan_crops(100, 163, 64, max_crops=2, fit="squash", interpolation=interpolation)  # type: ignore[arg-type]
    assert (crops.canvas_hw, crops.offsets) == ((64, 64), ((0, 0),))
    resized = Resize((64, 64), InterpolationMode(interpolation))(Image.fromarray(image))
    assert torch.equal(crop_image(image, crops)[0], to_tensor(resized))
    assert len(plan_crops(50, 12_000, 240, max_crops=2, fit="squash").offsets) == 1


def test_map_of_a_squashed_image_is_resized_to_its_proportions() -> None:
    """A patch in the lower right of the square is in the lower right of the image, also with a mask beside it."""
    crops = plan_crops(40, 120, 32, max_crops=2, fit="squash")
    patches = np.zeros((1, 4, 4), dtype=np.float32)
    patches[0, 3, 3] = 1.0
    merged = merge_maps(patches, crops)
    assert merged.shape == (32, 32)
    full = resize_map(merged, (40, 120))
    assert full.shape == (40, 120)
    row, column = np.unravel_index(full.argmax(), full.shape)
    assert row >= 30
    assert column >= 90
    mask = np.zeros((40, 120), dtype=bool)
    mask[30:, 90:] = True  # the same patch: a quarter of each side
    squashed = mask_to_canvas(mask, crops.canvas_hw)
    assert squashed.sum() == 8 * 8
    assert squashed[24:, 24:].all()


@pytest.mark.parametrize("side", [100, 240, 517])
def test_a_square_image_is_resized_as_open_clip_does(side: int) -> None:
    image = colours(side, side)
    theirs = image_transform(240, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    ours = crop_image(image, plan_crops(side, side, 240, max_crops=2))
    assert torch.equal(ours[0], theirs(Image.fromarray(image)))


def test_the_canvas_of_a_long_image_is_open_clips_before_its_centre_is_cut() -> None:
    image = colours(100, 163)
    crops = plan_crops(100, 163, 64, max_crops=9)
    ours = crop_image(image, crops)
    # the two crops are equal where they overlap
    shift = crops.offsets[1][1]
    assert torch.equal(ours[0, :, :, shift:], ours[1, :, :, : 64 - shift])
    theirs = image_transform(64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    centre = round((crops.canvas_hw[1] - 64) / 2)
    canvas = torch.zeros(3, *crops.canvas_hw)
    for crop, (_, left) in zip(ours, crops.offsets, strict=True):
        canvas[:, :, left : left + 64] = crop
    assert torch.equal(canvas[:, :, centre : centre + 64], theirs(Image.fromarray(image)))


@given(st.integers(20, 200), st.integers(20, 200), st.integers(1, 4), st.sampled_from([None, 16, 50]))
def test_maps_stay_in_the_range_of_the_patches(height: int, width: int, grid: int, size_out: int | None) -> None:
    crops = plan_crops(height, width, 32, max_crops=99)
    patches = np.random.default_rng(height).random((len(crops.offsets), grid, grid), dtype=np.float32)
    merged = merge_maps(patches, crops, size_out, smoothing_sigma_px=1.5)
    assert merged.shape == (crops.canvas_hw if size_out is None else scaled_hw(*crops.canvas_hw, size_out))
    assert merged.dtype == np.float32
    assert patches.min() - 1e-6 <= merged.min() <= merged.max() <= patches.max() + 1e-6


def test_a_map_at_its_own_size_is_itself() -> None:
    patches = torch.arange(256.0).reshape(1, 16, 16)
    np.testing.assert_array_equal(merge_maps(patches, plan_crops(16, 16, 16, 9)), patches[0].numpy())


@pytest.mark.parametrize("grid", [2, 3, 7])
def test_aligned_corners_put_the_corner_patches_on_the_corner_pixels(grid: int) -> None:
    side = 20
    patches = np.random.default_rng(grid).random((1, grid, grid))
    merged = merge_maps(patches, plan_crops(side, side, side, 9), align_corners=True)
    for y, x in np.ndindex(side, side):
        row, column = y * (grid - 1) / (side - 1), x * (grid - 1) / (side - 1)
        weights = np.maximum(0, 1 - np.abs(np.arange(grid) - row))[:, None] * np.maximum(
            0, 1 - np.abs(np.arange(grid) - column)
        )
        assert merged[y, x] == pytest.approx((weights * patches[0]).sum(), abs=1e-6)


def test_overlapping_crops_are_averaged() -> None:
    crops = plan_crops(32, 48, 32, max_crops=9)
    patches = torch.stack([torch.full((2, 2), 1.0), torch.full((2, 2), 3.0)])
    expected = np.repeat([[1.0, 2.0, 3.0]], 16, axis=1)
    np.testing.assert_array_equal(merge_maps(patches, crops), np.repeat(expected, 32, axis=0).astype(np.float32))


def test_a_hot_patch_is_hot_where_it_lies() -> None:
    crops = plan_crops(300, 100, 32, max_crops=9)
    patches = np.zeros((len(crops.offsets), 8, 8), dtype=np.float32)
    patches[-1, 7, 0] = 1.0  # lower left of the last crop: lower left of the image
    for size_out in (None, 100):
        merged = merge_maps(patches, crops, size_out)
        y, x = np.unravel_index(merged.argmax(), merged.shape)
        assert y > 0.95 * merged.shape[0]
        assert x < 0.15 * merged.shape[1]


def test_a_map_at_its_images_size_keeps_its_place() -> None:
    ramp = np.linspace(0, 1, 24, dtype=np.float32)[None].repeat(16, axis=0)
    grown = resize_map(ramp, (160, 240))
    assert grown.shape == (160, 240)
    assert (np.diff(grown, axis=1) >= 0).all()
    np.testing.assert_allclose(grown[:, 5::10], (ramp[:1] + np.diff(ramp, append=1)[:1] / 20).repeat(160, 0), atol=2e-3)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_a_mask_grown_by_a_whole_factor_comes_back(height: int, width: int, factor: int) -> None:
    mask = np.random.default_rng(width).random((height, width)) < 0.5
    grown = mask_to_canvas(mask, (height * factor, width * factor))
    np.testing.assert_array_equal(grown, mask.repeat(factor, axis=0).repeat(factor, axis=1))
    np.testing.assert_array_equal(mask_to_canvas(grown, (height, width)), mask)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int32, bool])
def test_maps_of_any_number_are_read_exactly(tmp_path: Path, dtype: Any) -> None:
    values = np.array([[0, 1, 0], [1, 1, 0]], dtype=dtype)
    np.save(tmp_path / "a.npy", values[None])
    found = read_map(tmp_path / "a.npy")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == (np.float64 if dtype in {np.float64, np.int32} else np.float32)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_float_tiffs_are_read_exactly(tmp_path: Path, compression: str | None) -> None:
    values = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tiff", values, compression=compression)
    np.testing.assert_array_equal(read_map(tmp_path / "a.tiff"), values)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: np.save(p, np.full((2, 2), np.nan)), "NaN"),
        (lambda p: np.save(p, np.full((2, 2), np.inf, dtype=np.float32)), "NaN or infinite"),
        (lambda p: np.save(p, np.zeros((2, 2, 3))), "shape"),
        (lambda p: np.save(p, np.zeros((0, 2))), "shape"),
        (lambda p: np.save(p, np.zeros((2, 2), dtype=complex)), "real numbers"),
        (lambda p: np.save(p, np.array([{}]), allow_pickle=True), "not a .npy file"),
        (lambda p: p.write_bytes(b""), "not a .npy file"),
        (lambda p: p.write_bytes(b"hello"), "not a .npy file"),
    ],
    ids=["nan", "inf", "colour", "empty", "complex", "pickle", "no bytes", "text"],
)
def test_other_files_are_refused_as_maps(tmp_path: Path, write: Callable[[Path], Any], said: str) -> None:
    write(tmp_path / "a.npy")
    with pytest.raises(InputError, match=said):
        read_map(tmp_path / "a.npy")


def test_a_map_cut_short_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((50, 50)))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-8])
    with pytest.raises(InputError, match=r"not a \.npy file"):
        read_map(tmp_path / "a.npy")


@pytest.mark.data
def test_every_real_image_is_read(real_data: Path) -> None:
    paths = sorted((real_data / "industrial" / "magnetic_tile" / "test").rglob("*.jpg"))
    assert len(paths) == 160
    for path in paths[::8]:
        image = read_image(path)
        height, width, _ = image.shape
        crops = plan_crops(height, width, 240, 64, path)
        assert crop_image(image, crops).shape == (len(crops.offsets), 3, 240, 240)
        assert len(crops.offsets) > 1


def test_images_are_read_in_order_by_threads_and_the_first_broken_one_is_reported(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        write_png(path, np.full((8, 8, 3), number, np.uint8))
    assert [int(image[0, 0, 0]) for image in map_in_threads(read_image, paths)] == list(range(6))
    for number in (2, 4):
        paths[number].write_bytes(b"broken")
    with pytest.raises(InputError, match=r"2\.png"):
        map_in_threads(read_image, paths)
