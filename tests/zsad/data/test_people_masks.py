"""Check masks and labels of people's own sets: names, formats, orientation, folders and layouts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medad.base.errors import InputError
from zsad.config.run import ImagesSettings
from zsad.data.datasets import Category, find_categories, normal_training_images
from zsad.data.images import read_image
from zsad.data.label_folders import listing_notes
from zsad.data.masks import bare_stem, check_mask, mask_note, read_mask

Array = NDArray[Any]
TRUTH = np.zeros((16, 24), dtype=bool)
TRUTH[3:9, 5:16] = True
GREY = (TRUTH * 255).astype(np.uint8)
ORIENTATION = 274


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def find(root: Path, **settings: Any) -> tuple[dict[str, Category], dict[str, str], str]:
    """Return categories by name, rules of problems by id, and the notes as one text."""
    categories, problems, left_out = find_categories(ImagesSettings(root=str(root), **settings))
    return (
        {one.name: one for one in categories},
        {one.case_id: one.rule for one in problems},
        "\n".join(listing_notes(left_out)),
    )


def labels(category: Category) -> dict[str, bool | None]:
    return {item.id: item.anomalous for item in category.items}


def masks_of(category: Category, root: Path) -> dict[str, str]:
    return {item.id: item.mask.relative_to(root).as_posix() for item in category.items if item.mask is not None}


@pytest.mark.parametrize(
    "name",
    [
        *("x", "x_mask", "x_gt", "x_label", "mask_x", "GT_x", "X_MASK", "x-mask", "x_seg", "x_ground_truth", "x.mask"),
        *("x.png", "x.jpg_mask", "x_segmentation", "label x"),
    ],
)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_masks_are_found_under_the_names_that_people_use(tmp_path: Path, name: str, ending: str) -> None:
    touch(tmp_path, "test/good/0.png", "test/bad/x.png", f"ground_truth/bad/{name}.{ending}")
    categories, problems, _ = find(tmp_path, category="nut")
    assert not problems
    assert masks_of(categories["nut"], tmp_path) == {"bad/x": f"ground_truth/bad/{name}.{ending}"}


def test_a_marked_name_that_is_an_images_own_is_that_images(tmp_path: Path) -> None:
    touch(tmp_path, "test/bad/x.png", "test/bad/x_gt.png", "test/good/0.png")
    touch(tmp_path, "ground_truth/bad/x_gt.png", "ground_truth/bad/x.png")
    categories, problems, _ = find(tmp_path, category="nut")
    assert not problems
    assert masks_of(categories["nut"], tmp_path) == {f"bad/{n}": f"ground_truth/bad/{n}.png" for n in ("x", "x_gt")}


@pytest.mark.parametrize("stem", ["mask", "gt", "masked_ball", "labeled", "001", "segment-1"])
def test_stems_without_a_mark_are_whole(stem: str) -> None:
    assert bare_stem(stem) == stem


def test_a_missing_mask_names_what_lies_there(tmp_path: Path) -> None:
    touch(tmp_path, "test/good/0.png", "test/bad/007.png", "test/bad/008.png")
    touch(tmp_path, "ground_truth/bad/defects-of-007-final.png")
    _, problems, _ = find_problems(tmp_path)
    assert problems["nut/bad/007"].endswith("no 007[_mask].png in bad/, which holds defects-of-007-final.png")
    assert problems["nut/bad/008"].endswith("no 008[_mask].png in bad/, which holds defects-of-007-final.png")


def find_problems(root: Path) -> tuple[dict[str, Category], dict[str, str], str]:
    return find(root, category="nut")


@pytest.mark.parametrize("names", [("x.png", "x_mask.png"), ("x_mask.bmp", "x_mask.png"), ("mask_x.png", "x.png")])
def test_two_masks_of_one_name_are_a_problem(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, "test/good/0.png", "test/bad/x.png", *(f"ground_truth/bad/{name}" for name in names))
    _, problems, _ = find_problems(tmp_path)
    assert problems == {"nut/bad/x": f"two masks of one name: {names[0]} and {names[1]}"}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("test/bad/cam1/x.png", "ground_truth/bad/cam1/x_mask.png"),
        ("test/bad/cam1/x.png", "ground_truth/bad/x_mask.png"),
        ("test/bad/x.png", "ground_truth/defect/x_mask.png"),
        ("test/bad/x.png", "ground_truth/x_mask.png"),
        ("test/bad/x.png", "masks/bad/x.png"),
        ("test/bad/x.png", "test/gt/bad/x.png"),
        ("test/bad/x.png", "test/bad/masks/x.png"),
        ("test/bad/x.png", "test/bad/x_mask.png"),
    ],
)
def test_masks_are_found_in_folders_that_people_use(tmp_path: Path, image: str, mask: str) -> None:
    touch(tmp_path, "test/good/0.png", image, mask)
    categories, problems, _ = find_problems(tmp_path)
    assert not problems
    assert list(masks_of(categories["nut"], tmp_path).values()) == [mask]
    assert len(categories["nut"].items) == 2


def test_masks_of_another_label_are_used_only_if_the_stem_is_unique(tmp_path: Path) -> None:
    touch(tmp_path, "test/good/0.png", "test/a/1.png", "test/b/1.png", "test/b/2.png")
    touch(tmp_path, "ground_truth/defect/1.png", "ground_truth/defect/2.png")
    categories, problems, _ = find_problems(tmp_path)
    assert masks_of(categories["nut"], tmp_path) == {"b/2": "ground_truth/defect/2.png"}
    assert set(problems) == {"nut/a/1", "nut/b/1"}


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def test_the_union_of_a_folders_masks_is_the_mask(tmp_path: Path) -> None:
    """Check MVTec LOCO: one folder per image, with one mask per defect, of any grey value."""
    left, right = GREY.copy(), (TRUTH * 3).astype(np.uint8)
    left[:, 10:], right[:, :10] = 0, 0
    folder = tmp_path / "loco/juice/ground_truth/logical_anomalies/007"
    save(folder / "000.png", Image.fromarray(left))
    save(folder / "001.png", Image.fromarray(right))
    touch(tmp_path / "loco/juice", "test/logical_anomalies/007.png", "test/good/0.png", "validation/good/0.png")
    categories, problems, _ = find(tmp_path / "loco")
    assert not problems
    (item,) = [one for one in categories["juice"].items if one.anomalous]
    assert item.mask == folder
    np.testing.assert_array_equal(read_mask(folder, TRUTH.shape), TRUTH)
    save(folder / "002.png", Image.new("L", (5, 4)))
    with pytest.raises(InputError, match="masks of different sizes"):
        read_mask(folder, TRUTH.shape)


def red_on(background: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(TRUTH.astype(np.uint8))
    image.putpalette([*background, 255, 0, 0])
    return image


def clear(colour: int) -> Image.Image:
    return Image.fromarray(np.dstack([np.full((*TRUTH.shape, 3), colour, np.uint8), GREY]))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("m.jpg", Image.fromarray(GREY)),
        ("m.jpg", Image.fromarray(GREY).convert("RGB")),
        ("m.webp", Image.fromarray(GREY)),
        ("m.gif", Image.fromarray(GREY)),
        ("m.bmp", Image.fromarray(GREY)),
        ("m.png", red_on((0, 0, 0))),
        ("m.gif", red_on((0, 0, 0))),
        ("m.png", Image.fromarray(TRUTH)),
        ("m.png", Image.fromarray(TRUTH.astype(np.uint8))),
        ("m.png", Image.fromarray(TRUTH.astype(np.uint16))),
        ("m.png", Image.fromarray((TRUTH * 65535).astype(np.uint16))),
        ("m.tif", Image.fromarray(TRUTH.astype(np.float32))),
        ("m.png", clear(255)),
        ("m.png", Image.merge("LA", (Image.new("L", TRUTH.shape[::-1], 255), Image.fromarray(GREY)))),
    ],
)
def test_the_same_mask_in_many_formats_is_the_same(tmp_path: Path, name: str, image: Image.Image) -> None:
    save(tmp_path / name, image, quality=90)
    found = read_mask(tmp_path / name, TRUTH.shape)
    # JPEG and WebP may move the outline by a pixel
    wrong = np.count_nonzero(found != TRUTH)
    assert wrong == 0 or (name[2:] in {"jpg", "webp"} and wrong <= 4)


def test_a_lossless_webp_of_ones_is_read(tmp_path: Path) -> None:
    save(tmp_path / "m.webp", Image.fromarray(TRUTH.astype(np.uint8)).convert("RGB"), lossless=True)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.webp", TRUTH.shape), TRUTH)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (red_on((255, 255, 255)), "covers the whole image; normal pixels must be black"),
        (clear(0), "labelled anomalous, but its mask is black"),
        (Image.fromarray(GREY * 0), "labelled anomalous, but its mask is black"),
    ],
    ids=["white background", "black on clear", "empty"],
)
def test_masks_that_cannot_be_meant_are_refused(tmp_path: Path, image: Image.Image, said: str) -> None:
    path = save(tmp_path / "m.png", image)
    with pytest.raises(InputError, match=said):
        check_mask(read_mask(path, TRUTH.shape), path)


def turned(path: Path, orientation: int, pixels: Array) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return save(path, Image.fromarray(pixels), exif=exif)


def test_exif_turns_the_mask_too_if_it_has_the_tag(tmp_path: Path) -> None:
    stored = np.rot90(GREY)
    image = turned(tmp_path / "i.png", 6, np.dstack([stored] * 3))
    mask = turned(tmp_path / "m.png", 6, stored)
    assert read_image(image).shape[:2] == TRUTH.shape
    np.testing.assert_array_equal(read_mask(mask, TRUTH.shape, image), TRUTH)
    assert mask_note(TRUTH, mask, image) is None


def test_a_mask_of_the_unturned_image_names_exif(tmp_path: Path) -> None:
    image = turned(tmp_path / "i.png", 6, np.dstack([np.rot90(GREY)] * 3))
    mask = save(tmp_path / "m.png", Image.fromarray(np.rot90(GREY)))
    with pytest.raises(InputError, match="the mask is 16 x 24 pixels, its image 24 x 16, turned by its EXIF orient"):
        read_mask(mask, TRUTH.shape, image)
    shown = save(tmp_path / "s.png", Image.fromarray(GREY))
    np.testing.assert_array_equal(read_mask(shown, TRUTH.shape, image), TRUTH)
    assert mask_note(TRUTH, shown, image) is None


def test_a_mask_that_fits_both_ways_is_noted(tmp_path: Path) -> None:
    image = turned(tmp_path / "i.png", 3, np.dstack([GREY] * 3))
    mask = save(tmp_path / "m.png", Image.fromarray(GREY))
    note = mask_note(TRUTH, mask, image)
    assert note is not None
    assert "EXIF" in note


def test_an_inverted_mask_is_noted(tmp_path: Path) -> None:
    image = save(tmp_path / "i.png", Image.fromarray(np.dstack([GREY] * 3)))
    mask = save(tmp_path / "m.png", Image.fromarray(255 - GREY))
    note = mask_note(~TRUTH, mask, image)
    assert note is not None
    assert "may be inverted" in note
    assert mask_note(TRUTH, mask, image) is None


def test_folders_without_a_normal_one_are_said_with_the_setting(tmp_path: Path) -> None:
    touch(tmp_path, "a/test/PASS/1.png", "a/test/FAIL/2.png", "b/test/PASS/1.png", "b/test/FAIL/2.png")
    touch(tmp_path, "a/train/PASS/9.png")
    categories, _, said = find(tmp_path)
    assert labels(categories["a"]) == {"FAIL/2": True, "PASS/1": True}
    assert said.startswith("a, b: no folder is called good, normal or ok (FAIL, PASS)")
    assert said.endswith("data.normal=[PASS]")
    categories, _, said = find(tmp_path, normal=["pass"])
    assert labels(categories["a"]) == {"FAIL/2": True, "PASS/1": False}
    assert said == ""
    images = normal_training_images(ImagesSettings(root=str(tmp_path), normal=("PASS",)), "a")
    assert images == (tmp_path / "a/train/PASS/9.png",)
    with pytest.raises(InputError, match=r"data\.normal: no folder is called PAS; the label folders are FAIL, PASS"):
        find(tmp_path, normal=["PAS"])


@pytest.mark.parametrize(
    ("normal", "anomalous"),
    [("PASS", "FAIL"), ("no_defect", "defect"), ("io", "nio"), ("defect-free", "damaged"), ("gut", "defective")],
)
def test_folders_that_look_like_labels_are_said(tmp_path: Path, normal: str, anomalous: str) -> None:
    touch(tmp_path, f"{normal}/1.png", f"{anomalous}/2.png")
    categories, _, said = find(tmp_path, category="nut")
    assert set(labels(categories["nut"]).values()) == {None}
    assert said.endswith(f"so these images have no labels. If one holds normal images, name it: data.normal=[{normal}]")
    categories, _, said = find(tmp_path, category="nut", normal=[normal])
    assert labels(categories["nut"]) == {f"{normal}/1": False, f"{anomalous}/2": True}
    assert said == ""


def test_folders_by_day_are_not_labels(tmp_path: Path) -> None:
    touch(tmp_path, "2024-05-01/cam1/1.png", "2024-05-02/cam2/2.png")
    assert find(tmp_path)[2] == ""


def test_pseudonyms_hide_the_names_of_labels(tmp_path: Path) -> None:
    touch(tmp_path, "test/burnt/1.png", "test/secret/2.png")
    said = find(tmp_path, pseudonyms=True, category="nut")[2]
    assert "burnt" not in said
    assert "secret" not in said
    assert said.endswith("data.normal=[NAME]")


@pytest.mark.parametrize(
    ("names", "category", "wanted", "masked"),
    [
        (
            ["can/train/good/0", "can/validation/good/0", "can/test_public/good/0", "can/test_public/bad/0",
             "can/test_public/ground_truth/bad/0_mask", "can/test_private/0"],
            "can", {"good/0": False, "bad/0": True}, {"bad/0": "can/test_public/ground_truth/bad/0_mask.png"},
        ),
        (
            ["nut/test/good/rgb/0", "nut/test/good/gt/0", "nut/test/good/xyz/0", "nut/test/hole/rgb/0",
             "nut/test/hole/gt/0", "nut/test/hole/xyz/0", "nut/train/good/rgb/0"],
            "nut", {"good/0": False, "hole/0": True}, {"hole/0": "nut/test/hole/gt/0.png"},
        ),
        (
            ["normal/0", "abnormal/1", "mask/1"],
            "*", {"normal/0": False, "abnormal/1": True}, {"abnormal/1": "mask/1.png"},
        ),
        (
            ["good/0", "crack/1", "mask/crack/1"],
            "*", {"good/0": False, "crack/1": True}, {"crack/1": "mask/crack/1.png"},
        ),
        (["OK/1", "NG/2", "masks/NG/2_mask"], "*", {"OK/1": False, "NG/2": True}, {"NG/2": "masks/NG/2_mask.png"}),
        (["Normal/1", "Anomaly/2"], "*", {"Normal/1": False, "Anomaly/2": True}, {}),
        (["train/OK/1", "test/OK/1", "test/NG/1"], "*", {"OK/1": False, "NG/1": True}, {}),
        (["train/good/1", "test/unknown/2"], "*", {"unknown/2": None}, {}),
        (["images/train/0", "images/test/1", "labels/x"], "images", {"1": None}, {}),
    ],
    ids=["ad2", "3d", "anomalib", "anomalib masks", "ngok", "upper", "traintest", "fewshot", "yolo"],
)  # fmt: skip
def test_layouts_of_other_sets(
    tmp_path: Path, names: list[str], category: str, wanted: dict[str, bool | None], masked: dict[str, str]
) -> None:
    touch(tmp_path, *(f"{name}.png" for name in names))
    categories, problems, _ = find(tmp_path)
    assert not problems
    (found,) = categories.values()
    assert category in {"*", found.name}
    assert labels(found) == wanted
    assert masks_of(found, tmp_path) == masked


def test_real_iad_has_several_categories_with_masks_beside_their_images(tmp_path: Path) -> None:
    for name in ("audiojack", "button"):
        touch(tmp_path / name, "OK/S1/a.jpg", "OK/S2/b.jpg", "NG/AK/S3/c.jpg", "NG/AK/S3/c.png", "NG/BX/S4/d.jpg")
    categories, problems, _ = find(tmp_path)
    assert list(categories) == ["audiojack", "button"]
    assert labels(categories["button"]) == {"NG/AK/S3/c": True, "OK/S1/a": False, "OK/S2/b": False}
    assert masks_of(categories["button"], tmp_path) == {"NG/AK/S3/c": "button/NG/AK/S3/c.png"}
    assert set(problems) == {"audiojack/NG/BX/S4/d", "button/NG/BX/S4/d"}


def test_what_is_not_a_test_image_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "can/test_public/good/0.png", "can/test_public/bad/0.heif", "can/test_private/0.png")
    touch(tmp_path, "can/test_private_mixed/0.png", "can/test_public/good/0.mp4")
    said = find(tmp_path)[2]
    assert "1 image in test_private/" in said
    assert "1 image in test_private_mixed/" in said
    assert "1 x .mp4" in said


def run_case(real_data: Path, script: str, out: Path) -> None:
    path = real_data.parent / "cases" / "images" / script
    if not path.is_file():
        pytest.skip(f"no script {path}")
    subprocess.run([sys.executable, path, out], check=True, capture_output=True)


REFUSED = {"c_half", "c_transposed", "d_palette_whitebg", "d_blackonclear", "e_empty", "f_exif6_raw"}


@pytest.mark.data
def test_every_case_of_masks(tmp_path: Path, real_data: Path) -> None:
    run_case(real_data, "masks.py", tmp_path / "m")
    categories, problems, said = find(tmp_path / "m")
    truth = [one for one in categories["a_plain"].items if one.mask]
    expected = {Path(one.id).name: read_mask(one.mask, (256, 320)) for one in truth if one.mask}
    for name, category in categories.items():
        for item in category.items:
            assert read_image(item.path).shape[:2] == (256, 320)
            if item.mask is None:
                assert not item.anomalous or name in {"h_nomasks", "j_otherlabels"}
            elif name in REFUSED:
                with pytest.raises(InputError):
                    check_mask(read_mask(item.mask, (256, 320), item.path), item.mask)
            else:
                found = read_mask(item.mask, (256, 320), item.path)
                wanted = expected[Path(item.id).name] ^ (name == "e_inverted")
                limit = 0.002 if name in {"b_jpg", "b_webp"} else 0
                assert (found != wanted).mean() <= limit, (name, item.id)
    assert set(problems) == {"i_onemissing/bad/001"}
    assert "j_otherlabels: no folder is called good, normal or ok (FAIL, PASS)" in said


@pytest.mark.data
def test_every_case_of_layouts(tmp_path: Path, real_data: Path) -> None:
    run_case(real_data, "layouts.py", tmp_path / "l")
    for folder in sorted((tmp_path / "l").iterdir()):
        categories, _, said = find(folder)
        for category in categories.values():
            for item in category.items:
                parts = item.path.relative_to(folder).parts
                assert not {"train", "validation", "ground_truth", "masks", "labels", "test_private"} & set(parts)
        known = any(item.anomalous is False for category in categories.values() for item in category.items)
        assert known or "data.normal=[" in said or "without a label" in said or folder.name == "yolo"
