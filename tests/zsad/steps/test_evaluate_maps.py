"""Tests of `evaluate_folders` against scikit-learn on the same pixels, or against figures known by construction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from medad.base.errors import InputError
from zsad.config.run import EvaluationSettings
from zsad.steps.evaluate_maps import FolderEvaluation, evaluate_folders

Array = NDArray[Any]
SHAPE = (24, 30)


def put_map(path: Path, values: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        tifffile.imwrite(path, values)


def put_mask(path: Path, mask: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def box(shape: tuple[int, int] = SHAPE) -> Array:
    mask = np.zeros(shape, dtype=bool)
    mask[4:10, 6:18] = True
    return mask


def run(folder: Path, **settings: Any) -> FolderEvaluation:
    return evaluate_folders(folder / "maps", folder / "masks", EvaluationSettings(**settings))


def rules(found: FolderEvaluation) -> dict[str, str]:
    return {problem.case_id: problem.rule for problem in found.problems}


@pytest.mark.parametrize(
    ("ending", "dtype"), [("npy", np.float32), ("npy", np.float64), ("tif", np.float32), ("tiff", np.float32)]
)
def test_figures_are_scikit_learns(tmp_path: Path, ending: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    maps, masks = [], []
    for n in range(6):
        mask = box() if n % 2 else np.zeros(SHAPE, dtype=bool)
        # differences below 1e-12 in float64: rounded to float32, all values would be equal
        step = 1e-12 if dtype == np.float64 else 1e-3
        maps.append((0.5 + step * (rng.random(SHAPE) + 0.5 * mask)).astype(dtype))
        masks.append(mask)
        put_map(tmp_path / f"maps/{n}.{ending}", maps[-1])
        put_mask(tmp_path / f"masks/{n}.png", mask)
    found = run(tmp_path)
    scores, labels = np.array(maps), np.array(masks)
    assert found.pixel.auroc == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()), abs=1e-12)
    assert found.pixel.ap == pytest.approx(average_precision_score(labels.ravel(), scores.ravel()), abs=1e-12)
    image = roc_auc_score(labels.any(axis=(1, 2)), scores.max(axis=(1, 2)))
    assert found.image.auroc == pytest.approx(image, abs=1e-12)
    assert (found.image.n_normal, found.image.n_anomalous, found.pixel.n_regions) == (3, 3, 3)
    assert found.pixel.aupro is not None
    assert not found.problems


def test_sub_folders_and_mask_names_of_mvtec(tmp_path: Path) -> None:
    put_map(tmp_path / "maps/crack/000.tiff", box().astype(np.float32))
    put_map(tmp_path / "maps/good/000.tiff", np.zeros(SHAPE, dtype=np.float32))
    put_mask(tmp_path / "masks/crack/000_mask.png", box())
    found = run(tmp_path)
    assert not found.problems
    assert (found.image.auroc, found.pixel.auroc) == (1.0, 1.0)
    assert found.pixel.aupro == pytest.approx(1.0, abs=1e-12)
    assert (found.image.n_normal, found.image.n_anomalous) == (1, 1)


def test_a_slip_in_a_name_makes_no_defect_normal(tmp_path: Path) -> None:
    put_map(tmp_path / "maps/a.npy", box().astype(np.float32))
    put_map(tmp_path / "maps/b1.npy", box().astype(np.float32))
    put_mask(tmp_path / "masks/a.png", box())
    put_mask(tmp_path / "masks/b-1.png", box())
    found = run(tmp_path)
    assert set(rules(found)) == {"b1", "b-1"}
    assert rules(found)["b1"].startswith("no mask of this name")
    assert rules(found)["b-1"] == "no map of this name"
    assert found.image.n_anomalous == 1


def test_each_bad_file_is_named_and_the_rest_measured(tmp_path: Path) -> None:
    good = box().astype(np.float32)
    for name in ("fine", "nan", "cut", "colour", "wide", "mask"):
        put_map(tmp_path / f"maps/{name}.npy", good)
        put_mask(tmp_path / f"masks/{name}.png", box())
    put_map(tmp_path / "maps/nan.npy", np.full(SHAPE, np.nan))
    put_map(tmp_path / "maps/colour.npy", np.zeros((*SHAPE, 3)))
    put_map(tmp_path / "maps/wide.npy", good.T.copy())  # swapped axes must not count as another size
    (tmp_path / "maps/cut.npy").write_bytes((tmp_path / "maps/cut.npy").read_bytes()[:-4])
    (tmp_path / "masks/mask.png").write_bytes(b"broken")
    found = run(tmp_path)
    assert set(rules(found)) == {"nan", "cut", "colour", "wide", "mask"}
    assert rules(found)["wide"] == "the mask is 30 x 24 pixels, its map 24 x 30"
    assert all("\n" not in rule for rule in rules(found).values())
    assert (found.image.n_anomalous, found.pixel.auroc) == (1, 1.0)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_larger_mask_is_brought_to_the_map(tmp_path: Path, factor: int) -> None:
    put_map(tmp_path / "maps/a.npy", box().astype(np.float32))
    put_mask(tmp_path / "masks/a.png", box().repeat(factor, axis=0).repeat(factor, axis=1))
    found = run(tmp_path)
    assert (found.pixel.auroc, found.pixel.n_anomalous_px) == (1.0, 72)
    assert found.pixel.n_normal_px == SHAPE[0] * SHAPE[1] - 72


def test_a_square_map_of_a_squashed_image_is_compared_with_its_squashed_mask(tmp_path: Path) -> None:
    wide = np.zeros((32, 64), dtype=bool)
    wide[8:16, 32:48] = True
    put_mask(tmp_path / "masks/a.png", wide)
    put_map(tmp_path / "maps/a.npy", wide[:, ::2].astype(np.float32))
    assert run(tmp_path).pixel.auroc == 1.0


def test_the_evaluation_size_scales_both(tmp_path: Path) -> None:
    mask = box().repeat(2, axis=0).repeat(2, axis=1)
    put_map(tmp_path / "maps/a.npy", mask.astype(np.float32))
    put_mask(tmp_path / "masks/a.png", mask)
    found = run(tmp_path, size_px=24)
    assert (found.pixel.auroc, found.pixel.n_anomalous_px, found.pixel.n_normal_px) == (1.0, 72, 24 * 30 - 72)


def test_smoothing_reaches_the_images_score(tmp_path: Path) -> None:
    # one high pixel in the normal image, a large medium area in the other: smoothing reverses their order
    hot = np.zeros(SHAPE, dtype=np.float32)
    hot[12, 12] = 1.0
    put_map(tmp_path / "maps/good/0.npy", hot)
    put_map(tmp_path / "maps/bad/0.npy", box().astype(np.float32) / 2)
    put_mask(tmp_path / "masks/bad/0.png", box())
    assert run(tmp_path).image.auroc == 0.0
    assert run(tmp_path, smoothing_sigma_px=2).image.auroc == 1.0


def test_one_class_is_undefined_and_no_crash(tmp_path: Path) -> None:
    put_map(tmp_path / "maps/0.npy", box().astype(np.float32))
    put_mask(tmp_path / "masks/0.png", np.zeros(SHAPE, dtype=bool))
    found = run(tmp_path)
    assert (found.image.auroc, found.pixel.auroc, found.pixel.aupro, found.pixel.pro_200) == (None,) * 4


def test_folders_that_hold_nothing_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path)
    (tmp_path / "maps").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match="no map to evaluate"):
        run(tmp_path)
    put_map(tmp_path / "maps/0.npy", box().astype(np.float32))
    with pytest.raises(InputError, match="the first of 1 problems: no mask of this name"):
        run(tmp_path)


def test_two_maps_of_one_stem_are_refused(tmp_path: Path) -> None:
    put_map(tmp_path / "maps/0.npy", box().astype(np.float32))
    put_map(tmp_path / "maps/0.tiff", box().astype(np.float32))
    put_mask(tmp_path / "masks/0.png", box())
    with pytest.raises(InputError, match=r"has the same name as 0\.npy"):
        run(tmp_path)


def put_pairs(folder: Path, names: dict[str, str], count: int = 4) -> None:
    """Write perfect maps and masks with the names `map` and `mask`, in which N is replaced by a number."""
    for n in range(count):
        mask = box() if n % 2 else np.zeros(SHAPE, dtype=bool)
        put_map(folder / "maps" / names["map"].replace("N", str(n)), mask.astype(np.float32))
        put_mask(folder / "masks" / names["mask"].replace("N", str(n)), mask)


@pytest.mark.parametrize("mask", ["N.jpg", "N.bmp", "N.gif", "N_mask.jpeg", "N/0.png", "N/a_mask.png"])
def test_masks_in_other_formats_and_in_folders_of_their_own(tmp_path: Path, mask: str) -> None:
    put_pairs(tmp_path, {"map": "N.npy", "mask": mask})
    found = run(tmp_path)
    assert not found.problems
    assert (found.image.auroc, found.pixel.n_images, found.pixel.n_regions) == (1.0, 4, 2)
    # JPEG may move the outline by a pixel
    assert found.pixel.auroc == pytest.approx(1.0, abs=0 if "jp" not in mask else 0.02)


def test_a_folder_of_masks_is_their_union(tmp_path: Path) -> None:
    left, right = box(), box()
    left[:, 10:], right[:, :10] = False, False
    put_map(tmp_path / "maps/bad/7.npy", box().astype(np.float32))
    put_mask(tmp_path / "masks/bad/7/000.png", left)
    put_mask(tmp_path / "masks/bad/7/001.png", right)
    found = run(tmp_path)
    assert not found.problems
    assert (found.pixel.auroc, found.pixel.n_anomalous_px) == (1.0, 72)


def test_two_masks_of_one_name_are_a_problem(tmp_path: Path) -> None:
    put_pairs(tmp_path, {"map": "N.npy", "mask": "N.png"})
    put_mask(tmp_path / "masks/1_mask.png", ~box())
    assert rules(run(tmp_path)) == {"1": "two masks of one name: 1.png and 1_mask.png"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"map": "N.npy", "mask": "N_gt.png"}, "a map is 0.npy, a mask 0_gt.png"),
        ({"map": "N_anomaly_map.npy", "mask": "N.png"}, "a map is 0_anomaly_map.npy, a mask 0.png"),
    ],
)
def test_names_that_never_fit_are_one_line_with_an_example(tmp_path: Path, names: dict[str, str], said: str) -> None:
    put_pairs(tmp_path, names)
    with pytest.raises(InputError) as caught:
        run(tmp_path)
    assert caught.value.rule.endswith(f"no mask has the name of a map; {said}")


def test_a_folder_without_maps_says_what_lies_there(tmp_path: Path) -> None:
    put_pairs(tmp_path, {"map": "N.npy", "mask": "N.png"})
    (tmp_path / "maps").rename(tmp_path / "others")
    (tmp_path / "masks").rename(tmp_path / "maps")
    (tmp_path / "others").rename(tmp_path / "masks")
    with pytest.raises(InputError, match=r"no map to evaluate .*\. Left out: 4 x \.png"):
        run(tmp_path)


def test_masks_that_cannot_be_meant_and_inverted_ones(tmp_path: Path) -> None:
    put_pairs(tmp_path, {"map": "N.npy", "mask": "N.png"})
    put_mask(tmp_path / "masks/0.png", np.ones(SHAPE, dtype=bool))
    put_mask(tmp_path / "masks/1.png", ~box())
    found = run(tmp_path)
    assert rules(found) == {"0": "the mask covers the whole image; normal pixels must be black"}
    assert found.notes == ("More than half of the image is anomalous in the mask, which may be inverted: 1.",)


def test_without_normal_images_the_figures_of_images_are_undefined(tmp_path: Path) -> None:
    put_map(tmp_path / "maps/0.npy", box().astype(np.float32))
    put_mask(tmp_path / "masks/0.png", box())
    found = run(tmp_path)
    assert (found.image.auroc, found.image.ap, found.image.f1max, found.image.f1max_threshold) == (None,) * 4
    assert found.pixel.auroc == 1.0


@pytest.mark.data
def test_every_case_of_maps(tmp_path: Path, real_data: Path) -> None:
    script = real_data.parent / "cases" / "images" / "maps.py"
    if not script.is_file():
        pytest.skip(f"no script {script}")
    subprocess.run([sys.executable, script, tmp_path / "m"], check=True, capture_output=True)
    plain = run(tmp_path / "m/plain")
    for name in ("jpgmask", "labelfolders", "loco"):
        found = run(tmp_path / "m" / name)
        assert not found.problems
        assert found.image == plain.image
        assert found.pixel.auroc == pytest.approx(plain.pixel.auroc, abs=1e-3)
    assert rules(run(tmp_path / "m/both")) == {"000": "two masks of one name: 000.png and 000_mask.png"}
    for name in ("gtname", "mapname", "empty", "pickle", "dupmap", "pngmap", "othershape"):
        with pytest.raises(InputError) as caught:
            run(tmp_path / "m" / name)
        assert "\n" not in str(caught.value)
