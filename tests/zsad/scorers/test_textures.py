"""Tests of textures: each depends only on its generator, and pictures of a folder are processed as Pillow does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medad.base.errors import InputError
from tests.seeded import generators
from zsad.scorers import textures
from zsad.scorers.textures import AUGMENTATIONS, GeneratedTextures, TextureFolder, Textures, open_textures

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write six pictures of different sizes and formats in two folders, a text file, and a hidden file."""
    rng = np.random.default_rng(0)
    for i, suffix in enumerate(["png", "jpg", "bmp", "tif", "webp", "jpeg"]):
        place = tmp_path / "textures" / ("banded", "woven")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 40, 3), dtype=np.uint8)).save(place / f"t{i}.{suffix}")
    (tmp_path / "textures" / "README.txt").write_text("not a picture", encoding="utf-8")
    (tmp_path / "textures" / ".hidden.png").write_bytes(b"not a picture either")
    return tmp_path / "textures"


@pytest.mark.parametrize("kind", ["folder", "generated"])
def test_a_texture_is_its_generators_own(kind: str, folder: Path) -> None:
    source: Textures = open_textures(folder if kind == "folder" else None)
    together = source.draw(generators(*range(12)), 32, CPU)
    assert together.shape == (12, 3, 32, 32)
    assert together.min() >= 0
    assert together.max() <= 1
    for seed in (3, 11, 0):
        torch.testing.assert_close(source.draw(generators(seed), 32, CPU)[0], together[seed])
    distinct = {image.numpy().round(4).tobytes() for image in together}
    assert len(distinct) == 12


def test_generated_textures_have_contrast_and_variety() -> None:
    drawn = GeneratedTextures().draw(generators(*range(64)), 64, CPU)
    assert drawn.std((1, 2, 3)).min() > 0.02
    # any two differ by more than rounding: mean colours are spread over the colour cube
    assert (drawn.mean((2, 3)).std(0) > 0.1).all()


def test_without_changes_a_folders_picture_is_pillows_resize(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures, "AUGMENTATIONS_PER_TEXTURE", 0)
    drawn = TextureFolder(folder).draw(generators(*range(300)), 16, CPU)
    paths = list(folder.rglob("t?.*"))
    expected = {
        (np.asarray(Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)) / np.float32(255))
        .transpose(2, 0, 1)
        .tobytes()
        for path in paths
    }
    counts = Counter(image.numpy().tobytes() for image in drawn)
    assert set(counts) == expected, "every picture, and nothing else"
    # binomial, 300 draws at 1/6: mean 50, sd 6.5
    assert all(24 < count < 76 for count in counts.values())


def test_three_different_changes_in_an_order_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def recorder(number: int) -> Callable[[Image.Image, torch.Generator], Image.Image]:
        def change(picture: Image.Image, _: torch.Generator) -> Image.Image:
            seen.append(number)
            return picture

        return change

    monkeypatch.setattr(textures, "AUGMENTATIONS", [recorder(number) for number in range(len(AUGMENTATIONS))])
    TextureFolder(folder).draw(generators(*range(70)), 8, CPU)
    triples = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(triples) == 70
    assert all(len(set(triple)) == 3 for triple in triples)
    assert set(seen) == set(range(7))
    assert len(set(triples)) > 30


@pytest.mark.parametrize("change", AUGMENTATIONS, ids=[change.__name__ for change in AUGMENTATIONS])
def test_changes_keep_size_and_mode_and_do_something(
    change: Callable[[Image.Image, torch.Generator], Image.Image],
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 180, (16, 20, 3), dtype=np.uint8))
    changed = [change(picture, generator) for generator in generators(*range(4))]
    assert all(image.size == picture.size and image.mode == "RGB" for image in changed)
    assert any(image.tobytes() != picture.tobytes() for image in changed)


def test_recolouring_keeps_how_light_a_pixel_is() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    (changed,) = (textures.recolour(picture, generator) for generator in generators(1))
    # the value (V of HSV) is the largest of the three channels
    np.testing.assert_allclose(np.asarray(changed).max(2).astype(int), np.asarray(picture).max(2).astype(int), atol=1)


def test_a_folder_is_read_in_one_order_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    before = open_textures(folder).draw(generators(*range(5)), 8, CPU)
    moved = folder.rename(tmp_path / "elsewhere")
    assert torch.equal(open_textures(str(moved)).draw(generators(*range(5)), 8, CPU), before)


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_textures(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no textures here"):
        open_textures(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(InputError, match=r"broken\.png"):
        open_textures(tmp_path).draw(generators(0), 8, CPU)
