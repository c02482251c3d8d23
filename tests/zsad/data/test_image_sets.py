"""Check which images are found in folders of each layout, and which are reported as problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medad.base.errors import ConfigError, InputError
from zsad.config.run import ImagesSettings
from zsad.data.datasets import Category, Item, find_categories, unlabelled_images
from zsad.data.images import read_image
from zsad.data.masks import read_mask


def touch(root: Path, *names: str) -> None:
    """Make empty files, which suffice because listing opens no file."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def find(root: Path, **settings: Any) -> tuple[dict[str, Category], dict[str, str]]:
    """Return categories by name, and rules of problems by CATEGORY/ID."""
    categories, problems, _ = find_categories(ImagesSettings(root=str(root), **settings))
    return {c.name: c for c in categories}, {p.case_id: p.rule for p in problems}


def ids(category: Category) -> list[str]:
    return [item.id for item in category.items]


def mvtec(root: Path) -> None:
    touch(root, "train/good/000.png", "test/good/000.png", "test/good/010.png", "test/good/2.png")
    touch(root, "test/crack/000.png", "ground_truth/crack/000_mask.png")
    touch(root, "test/hole/000.png", "ground_truth/hole/000_mask.png", "license.txt", "readme.txt")


def test_mvtec_test_images_with_their_masks(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    mvtec(tmp_path / "cable")
    categories, problems = find(tmp_path)
    assert list(categories) == ["bottle", "cable"]
    assert not problems
    bottle = categories["bottle"]
    # natural order, without images of train/
    assert ids(bottle) == ["crack/000", "good/000", "good/2", "good/010", "hole/000"]
    assert bottle.labelled
    test, truth = tmp_path / "bottle/test", tmp_path / "bottle/ground_truth"
    assert bottle.items[0] == Item("crack/000", test / "crack/000.png", True, "crack", truth / "crack/000_mask.png")
    assert bottle.items[1] == Item("good/000", test / "good/000.png", False, "good", None)


def test_a_category_by_itself_may_be_named(tmp_path: Path) -> None:
    mvtec(tmp_path / "x17")
    assert list(find(tmp_path / "x17")[0]) == ["x17"]
    assert list(find(tmp_path / "x17", category="glass bottle")[0]) == ["glass bottle"]
    with pytest.raises(ConfigError, match="several categories"):
        find(tmp_path, category="glass bottle")


def test_masks_may_have_the_images_own_stems(tmp_path: Path) -> None:
    """Check VisA converted to MVTec's layout: test/{good,bad}, ground_truth/bad/STEM.png, images with suffix .JPG."""
    touch(tmp_path, "candle/train/good/0.JPG", "candle/test/good/0001.JPG", "candle/test/bad/000.JPG")
    touch(tmp_path, "candle/ground_truth/bad/000.png")
    candle = find(tmp_path)[0]["candle"]
    assert [(i.id, i.anomalous, i.defect) for i in candle.items] == [
        ("bad/000", True, "bad"),
        ("good/0001", False, "good"),
    ]
    assert candle.items[0].mask == tmp_path / "candle/ground_truth/bad/000.png"


def test_an_anomalous_image_without_its_mask_is_reported_and_the_rest_found(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    (tmp_path / "bottle/ground_truth/crack/000_mask.png").unlink()
    categories, problems = find(tmp_path)
    assert ids(categories["bottle"]) == ["good/000", "good/2", "good/010", "hole/000"]
    assert problems == {"bottle/crack/000": "anomalous, but without a mask: no 000[_mask].png in crack/"}


def test_without_any_masks_the_labels_are_enough(tmp_path: Path) -> None:
    touch(tmp_path, "a/test/good/0.png", "a/test/bad/1.png")
    categories, problems = find(tmp_path)
    assert [(i.anomalous, i.mask) for i in categories["a"].items] == [(True, None), (False, None)]
    assert not problems


def test_hidden_and_foreign_files_are_skipped_and_stray_images_named(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    touch(tmp_path / "bottle/test", "good/._000.png", "good/Thumbs.db", ".ipynb_checkpoints/1.png", "stray.png")
    touch(tmp_path / "bottle/test", "good/.git/1.png")
    categories, problems = find(tmp_path)
    assert len(categories["bottle"].items) == 5
    assert problems == {"bottle/stray": "is outside the label folders, so it has no label"}


def test_images_of_one_stem_keep_their_endings(tmp_path: Path) -> None:
    touch(tmp_path, "test/good/1.png", "test/good/1.jpg", "test/good/2.png")
    (category,) = find(tmp_path)[0].values()
    assert ids(category) == ["good/1.jpg", "good/1.png", "good/2"]


def test_categories_are_chosen_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c10", "c9"):
        mvtec(tmp_path / name)
    assert list(find(tmp_path)[0]) == ["a", "b", "c9", "c10"]
    assert list(find(tmp_path, categories=["c9", "a"])[0]) == ["a", "c9"]
    with pytest.raises(InputError, match="no category d; the set has a, b, c9, c10"):
        find(tmp_path, categories=["a", "d"])


def test_a_category_that_holds_nothing_is_named(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    (tmp_path / "empty/test/good").mkdir(parents=True)
    categories, problems = find(tmp_path)
    assert list(categories) == ["bottle"]
    assert problems == {"empty": "no test image in this category"}


def visa(root: Path) -> None:
    touch(root, *(f"candle/Data/Images/Normal/{n:04}.JPG" for n in range(4)))
    touch(root, *(f"candle/Data/Images/Anomaly/{n:03}.JPG" for n in range(2)))
    touch(root, *(f"candle/Data/Masks/Anomaly/{n:03}.png" for n in range(2)), "candle/image_anno.csv")


def split(root: Path, *rows: str) -> Path:
    path = root / "split_csv/1cls.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["object,split,label,image,mask", *rows]) + "\n", encoding="utf-8")
    return path


NORMAL = "candle,{},normal,candle/Data/Images/Normal/{:04}.JPG,"
ANOMALY = "candle,test,anomaly,candle/Data/Images/Anomaly/{0:03}.JPG,candle/Data/Masks/Anomaly/{0:03}.png"


def test_visa_without_a_split_file_is_all_test_images(tmp_path: Path) -> None:
    visa(tmp_path)
    categories, problems = find(tmp_path)
    candle = categories["candle"]
    assert ids(candle) == ["Anomaly/000", "Anomaly/001", *(f"Normal/{n:04}" for n in range(4))]
    assert [i.anomalous for i in candle.items] == [True, True, False, False, False, False]
    assert candle.items[1].mask == tmp_path / "candle/Data/Masks/Anomaly/001.png"
    assert not problems


@pytest.mark.parametrize("root", [".", "candle"], ids=["set", "category"])
def test_visas_split_file_says_which_are_test_images(tmp_path: Path, root: str) -> None:
    visa(tmp_path)
    others = "pcb1,test,normal,pcb1/Data/Images/Normal/0000.JPG,"
    split(tmp_path, *(NORMAL.format("train", n) for n in (0, 2)), NORMAL.format("test", 3), ANOMALY.format(1), others)
    categories, problems = find(tmp_path / root)
    assert list(categories) == ["candle"]
    assert ids(categories["candle"]) == ["Anomaly/001", "Normal/0003"]
    assert categories["candle"].items[0].mask == tmp_path / "candle/Data/Masks/Anomaly/001.png"
    assert not problems


def test_a_renamed_category_is_the_one_object_of_its_split_file(tmp_path: Path) -> None:
    visa(tmp_path)
    split(tmp_path, NORMAL.format("test", 3), ANOMALY.format(1))
    (tmp_path / "candle").rename(tmp_path / "wax")
    categories, problems = find(tmp_path)
    assert not problems
    assert ids(categories["wax"]) == ["Anomaly/001", "Normal/0003"]
    assert categories["wax"].items[0].mask == tmp_path / "wax/Data/Masks/Anomaly/001.png"


def test_a_category_without_rows_in_the_split_file_is_reported_and_the_others_found(tmp_path: Path) -> None:
    visa(tmp_path)
    touch(tmp_path, "wax/Data/Images/Normal/0000.JPG")
    split(tmp_path, NORMAL.format("test", 3), "pcb1,test,normal,pcb1/Data/Images/Normal/0000.JPG,")
    said = "split_csv/1cls.csv has no rows for wax, only for candle, pcb1"
    categories, problems = find(tmp_path)
    assert list(categories) == ["candle"]
    assert problems == {"wax": said}
    with pytest.raises(InputError, match=f"the first of 1 problems: {said}"):
        find(tmp_path / "wax")
    # one object in the file, but two folders: the rows belong to the folder with the object's name
    split(tmp_path, NORMAL.format("test", 3))
    assert find(tmp_path)[1] == {"wax": "split_csv/1cls.csv has no rows for wax, only for candle"}
    (tmp_path / "candle").rename(tmp_path / "tallow")
    with pytest.raises(InputError, match="has no rows for tallow, only for candle"):
        find(tmp_path)


def test_another_split_of_visa_is_used_if_requested(tmp_path: Path) -> None:
    visa(tmp_path)
    split(tmp_path, NORMAL.format("test", 3), ANOMALY.format(1)).rename(tmp_path / "split_csv/2cls_highshot.csv")
    split(tmp_path, NORMAL.format("test", 1))
    assert ids(find(tmp_path)[0]["candle"]) == ["Normal/0001"]
    assert ids(find(tmp_path, visa_split="2cls_highshot")[0]["candle"]) == ["Anomaly/001", "Normal/0003"]
    with pytest.raises(InputError, match=r"2cls_fewshot\.csv: no such split file"):
        find(tmp_path, visa_split="2cls_fewshot")
    mvtec(tmp_path / "other/bottle")
    with pytest.raises(ConfigError, match="only for layout visa"):
        find(tmp_path / "other", visa_split="2cls_fewshot")


def test_missing_files_of_visas_split_file_are_reported(tmp_path: Path) -> None:
    visa(tmp_path)
    split(tmp_path, NORMAL.format("test", 3), NORMAL.format("test", 9), ANOMALY.format(0), ANOMALY.format(1))
    (tmp_path / "candle/Data/Masks/Anomaly/001.png").unlink()
    categories, problems = find(tmp_path)
    assert ids(categories["candle"]) == ["Anomaly/000", "Normal/0003"]
    assert problems == {
        "candle/Normal/0009": "listed in 1cls.csv, but the file is missing",
        "candle/Anomaly/001": "anomalous, but without a mask: 1cls.csv names no existing one",
    }


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", "object,split,label,image,mask\ncandle,test,maybe,x.JPG,\n", "\x00\xff"],
    ids=["empty", "columns", "label", "binary"],
)
def test_a_broken_split_file_is_one_line(tmp_path: Path, text: str) -> None:
    visa(tmp_path)
    split(tmp_path).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"1cls\.csv: ") as caught:
        find(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_with_labels(tmp_path: Path) -> None:
    root = tmp_path / "nuts"
    touch(root, "good/1.png", "Scratch/1.png", "Scratch/deep/2.bmp", "masks/Scratch/1.png", "masks/Scratch/deep/2.png")
    categories, problems = find(root)
    nuts = categories["nuts"]
    assert [(i.id, i.anomalous, i.mask and i.mask.relative_to(root).as_posix()) for i in nuts.items] == [
        ("Scratch/1", True, "masks/Scratch/1.png"),
        ("Scratch/deep/2", True, "masks/Scratch/deep/2.png"),
        ("good/1", False, None),
    ]
    assert not problems


def test_all_masks_in_one_folder_need_unique_stems(tmp_path: Path) -> None:
    touch(tmp_path, "OK/1.png", "a/2.png", "b/3.png", "b/2.png", "truth/2.png", "truth/3.png")
    categories, problems = find(tmp_path, masks="truth", category="nut")
    assert ids(categories["nut"]) == ["OK/1", "b/3"]
    assert set(problems) == {"nut/a/2", "nut/b/2"}
    assert all(rule.startswith("ambiguous mask") for rule in problems.values())


def test_a_folder_of_mere_images(tmp_path: Path) -> None:
    root = tmp_path / "nuts"
    touch(root, "10.png", "9.jpeg", "more/1.TIFF", "notes.txt", "masks/9.png")
    nuts = find(root)[0]["nuts"]
    assert ids(nuts) == ["9", "10", "more/1"]
    assert {(i.anomalous, i.defect, i.mask) for i in nuts.items} == {(None, "", None)}
    assert not nuts.labelled


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"masks": "truth"}, InputError, "no such folder of masks"),
        ({"masks": "m"}, InputError, "masks can only be used with label folders"),
        ({"layout": "mvtec"}, InputError, "no usable image of layout mvtec"),
        ({"layout": "visa"}, InputError, "no usable image of layout visa"),
        ({"layout": "mvtec", "masks": "m"}, ConfigError, "only for layout folder"),
    ],
)
def test_a_tree_of_another_shape_is_one_line(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    touch(tmp_path, "1.png", "m/1.png")
    with pytest.raises(error, match=said) as caught:
        find(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find(tmp_path / "x")
    with pytest.raises(InputError, match="no usable image of layout folder"):
        find(tmp_path)


def test_pseudonyms_hide_names_and_stay_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "test/good/secret.png", "test/burnt/secret.png", "ground_truth/x/1.png")
    touch(tmp_path, "test/burnt/hidden.png", "ground_truth/burnt/hidden.png", "test/secret.png")
    first, again = (find_categories(ImagesSettings(root=str(tmp_path), pseudonyms=True)) for _ in range(2))
    assert first == again
    (category,), problems, _ = first
    shown = str([(i.id, i.defect) for i in category.items]) + str([(p.case_id, p.rule) for p in problems])
    assert len(problems) == 2
    assert not any(word in shown for word in ("secret", "hidden", "burnt"))
    assert len({i.id for i in category.items} | {p.case_id.removeprefix(f"{p.category}/") for p in problems}) == 4
    assert {(i.defect, i.anomalous) for i in category.items} == {("good", False), ("anomalous", True)}


def test_sample_roots(tmp_path: Path) -> None:
    mvtec(tmp_path / "materials/brick")
    (category,), _, _ = find_categories(ImagesSettings(root="samples:materials"), tmp_path)
    assert category.name == "brick"
    for root in ("samples:../x", "samples:", "samples:.."):
        with pytest.raises(InputError, match="samples:NAME"):
            find_categories(ImagesSettings(root=root), tmp_path)
    with pytest.raises(InputError, match="sample data are missing"):
        find_categories(ImagesSettings(root="samples:materials"))


def test_images_to_score_each_once_and_under_unique_ids(tmp_path: Path) -> None:
    touch(tmp_path, "parts/1.png", "parts/sub/1.png", "parts/2.png", "parts/readme.txt", "other/1.png", "odd.dat")
    (tmp_path / "link.png").symlink_to(tmp_path / "parts/2.png")
    folder, other = tmp_path / "parts", tmp_path / "other"
    found, problems, _ = unlabelled_images(
        [folder, folder / "1.png", other, tmp_path / "odd.dat", tmp_path / "link.png"]
    )
    assert not problems
    assert found.name == "parts"
    assert {i.id: i.path for i in found.items} == {
        "1": other / "1.png",
        "1-2": folder / "1.png",
        "2": folder / "2.png",
        "odd": tmp_path / "odd.dat",
        "sub/1": folder / "sub/1.png",
    }
    assert not found.labelled
    assert unlabelled_images([folder / "1.png"])[0].name == "parts"


def test_images_to_score_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        unlabelled_images([tmp_path / "x.png"])
    with pytest.raises(InputError, match="no image in this folder"):
        unlabelled_images([tmp_path])
    with pytest.raises(InputError, match="none given"):
        unlabelled_images([])


def test_a_folder_linked_to_itself_ends(tmp_path: Path) -> None:
    touch(tmp_path, "good/1.png", "bad/1.png")
    (tmp_path / "good/loop").symlink_to(tmp_path)
    (category,) = find(tmp_path, category="x")[0].values()
    assert ids(category) == ["bad/1", "good/1"]


@pytest.mark.data
def test_real_sets_are_found_whole(real_data: Path) -> None:
    categories, problems = find(real_data / "industrial")
    assert not problems
    counts = {
        name: (len(c.items), sum(bool(i.anomalous) for i in c.items), sum(i.mask is not None for i in c.items))
        for name, c in categories.items()
    }
    # images, defects and masks, as in the list that comes with the data
    assert counts == {"hazelnut_toy": (23, 17, 17), "magnetic_tile": (160, 80, 80), "screw": (56, 40, 40)}


@pytest.mark.data
def test_real_masks_fit_their_images(real_data: Path) -> None:
    for category in find(real_data / "industrial")[0].values():
        for item in [i for i in category.items if i.mask is not None][::8]:
            assert item.mask is not None
            height, width, _ = read_image(item.path).shape
            mask = read_mask(item.mask, (height, width))
            # a JPEG's grey edges would make far more anomalous pixels
            assert 0 < mask.mean() < 0.6


def test_listing_opens_no_image(tmp_path: Path) -> None:
    mvtec(tmp_path / "a")
    (tmp_path / "a/test/good/000.png").write_bytes(b"broken")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "a/test/good/010.png")
    assert len(find(tmp_path)[0]["a"].items) == 5
