"""Check the samples of the demo: pixels outside the masks are real, and the folder is made once and completely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from skimage.measure import label
from skimage.transform import resize

from zsad.config.run import ImagesSettings
from zsad.data.datasets import find_categories
from zsad.data.images import read_image
from zsad.data.masks import read_mask
from zsad.embedded import materials, samples
from zsad.embedded.materials import SIDE_PX, WINDOW_PX
from zsad.embedded.samples import ensure_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_samples(tmp_path_factory.mktemp("samples"), lambda _: None)


def test_each_material_has_good_and_defective_pieces_with_masks(folder: Path) -> None:
    categories, problems, _ = find_categories(ImagesSettings(root=str(folder), layout="mvtec"))
    assert not problems
    assert [category.name for category in categories] == ["brick", "coins", "grass", "gravel"]
    for category in categories:
        defective = [item for item in category.items if item.anomalous]
        assert len(defective) >= 6
        assert len(category.items) - len(defective) >= 6
        assert len(list((folder / category.name / "train" / "good").iterdir())) >= 4
        for item in defective:
            assert item.mask is not None
            assert read_mask(item.mask, (SIDE_PX, SIDE_PX)).any()


def test_each_piece_is_used_once(folder: Path) -> None:
    for name, pieces in (("brick", 16), ("grass", 16), ("gravel", 16)):
        used = [path.stem for part in ("train", "test") for path in (folder / name / part).rglob("*.png")]
        assert sorted(used) == [f"{number:03}" for number in range(pieces)]


def test_outside_its_mask_a_window_is_the_photograph(folder: Path) -> None:
    photograph = data.gravel()
    for path in sorted((folder / "gravel").glob("t*/*/*.png")):
        number = int(path.stem)
        y, x = (WINDOW_PX * place for place in divmod(number, photograph.shape[0] // WINDOW_PX))
        window = photograph[y : y + WINDOW_PX, x : x + WINDOW_PX] / 255.0
        expected = resize(window.astype(np.float32), (SIDE_PX, SIDE_PX), order=1, anti_aliasing=False)
        difference = np.abs(read_image(path)[..., 0] / 255.0 - expected)
        if path.parent.name == "good":
            assert difference.max() < 0.003
            continue
        mask = np.asarray(Image.open(folder / "gravel/ground_truth" / path.parent.name / f"{path.stem}_mask.png")) > 0
        assert difference[~mask].max() < least_change() + 0.003
        assert (difference[mask] > least_change() - 0.01).mean() > 0.5, "a mask has gaps that it closed, but few"
        assert label(~mask, connectivity=1).max() <= 2, "a mask has no hole"


def least_change() -> float:
    from zsad.embedded.scenes.scenes import LEAST_CHANGE

    return LEAST_CHANGE


def test_they_are_made_once(folder: Path) -> None:
    said: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ensure_samples(folder.parent, said.append) == folder
    assert not said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_photographs_of_an_earlier_version_are_replaced(tmp_path: Path) -> None:
    old = tmp_path / samples.MATERIALS
    (old / "wood" / "test" / "good").mkdir(parents=True)
    (old / "SOURCE.txt").write_text("Photographs of another version.", encoding="utf-8")
    made = ensure_samples(tmp_path, lambda _: None)
    assert not (made / "wood").exists()
    assert (made / "brick" / "train" / "good").is_dir()


def test_an_incomplete_folder_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(folder: Path, pieces: object) -> None:
        del pieces
        folder.mkdir(parents=True)
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(materials, "_write", dies)
        with pytest.raises(RuntimeError):
            ensure_samples(tmp_path, lambda _: None)
    assert not (tmp_path / samples.MATERIALS).exists()
    made = ensure_samples(tmp_path, lambda _: None)
    assert (made / "brick" / "test" / "good").is_dir()
