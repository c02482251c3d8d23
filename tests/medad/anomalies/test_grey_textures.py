"""Textures of DRAEM's pseudo anomalies: generated textures, and pictures of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medad.anomalies.textures import open_textures
from medad.base.errors import InputError
from medad.base.textures import texture_files, textures_digest
from medad.config.anomalies import TextureSettings
from tests.seeded import generators

CPU = torch.device("cpu")
SIDE = 32


def _folder(path: Path, *names: str, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in names:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # every grey value occurs at most once, so that the order of values shows whether a change inverts it
        grey = rng.permutation(256)[: 8 * 8].reshape(8, 8).astype(np.uint8)
        Image.fromarray(np.kron(grey, np.ones((SIDE // 8, SIDE // 8), np.uint8))).save(target)
    return path


@pytest.mark.parametrize("kind", ["generated", "folder"])
def test_a_slices_texture_is_its_generators_own(tmp_path: Path, kind: str) -> None:
    folder = str(_folder(tmp_path, "a.png", "b/c.png")) if kind == "folder" else None
    textures = open_textures(TextureSettings(folder=folder), SIDE)
    together = textures.draw(generators(*range(12)), CPU)
    assert together.shape == (12, 1, SIDE, SIDE)
    assert together.dtype == torch.float32
    assert 0 <= together.min() <= together.max() <= 255
    for seed in range(12):
        assert torch.equal(textures.draw(generators(seed), CPU)[0], together[seed])
    assert len({each.numpy().tobytes() for each in together}) == 12


def test_generated_textures_have_contrast() -> None:
    spread = open_textures(TextureSettings(), 64).draw(generators(*range(40)), CPU).flatten(1).std(1)
    assert (spread > 5).all()
    assert spread.mean() > 25


def test_a_folders_textures_are_its_pictures_turned_and_toned(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "one.png")
    cells = np.asarray(Image.open(folder / "one.png"))[::4, ::4]
    seen = set()
    for drawn in open_textures(TextureSettings(folder=str(folder)), SIDE).draw(generators(*range(60)), CPU):
        small = drawn[0, ::4, ::4].numpy()
        matches = [
            (turns, mirrored, inverted)
            for turns in range(4)
            for mirrored in (False, True)
            for inverted in (False, True)
            if (np.argsort(small, None) == np.argsort(_variant(cells, turns, mirrored, inverted), None)).all()
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 10


def _variant(cells: np.ndarray, turns: int, mirrored: bool, inverted: bool) -> np.ndarray:
    turned = np.rot90(cells.astype(int), turns)
    turned = turned[:, ::-1] if mirrored else turned
    return 255 - turned if inverted else turned


def test_files_are_found_below_and_hidden_ones_are_not(tmp_path: Path) -> None:
    _folder(tmp_path, "b.png", "a/z.jpg", ".hidden/c.png", ".d.png")
    (tmp_path / "readme.txt").write_text("no picture", encoding="utf-8")
    assert texture_files(tmp_path) == [tmp_path / "a" / "z.jpg", tmp_path / "b.png"]


def test_the_digest_is_the_contents(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    _folder(one, "a.png", "b.png")
    _folder(same, "p.png", "q.png")
    _folder(other, "a.png", "b.png", seed=1)
    assert textures_digest(one) == textures_digest(same)
    assert textures_digest(one) != textures_digest(other)
    digests = [open_textures(TextureSettings(folder=str(each)), SIDE).digest for each in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        texture_files(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no textures here"):
        texture_files(tmp_path)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"torn\.png: not a readable picture"):
        open_textures(TextureSettings(folder=str(tmp_path)), SIDE)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "torn.png")
    with pytest.raises(InputError, match=r"torn\.png: expected a picture with 8 bits per channel"):
        open_textures(TextureSettings(folder=str(tmp_path)), SIDE)
