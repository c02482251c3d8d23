"""Check what is listed for each public set, on a small copy written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from medad.base.errors import ConfigError, InputError
from zsad.config.layouts import LAYOUTS, PublicSetName
from zsad.config.run import ImagesSettings
from zsad.data.datasets import Category, find_categories, normal_training_images
from zsad.data.masks import read_mask

Listed = tuple[str, bool, str | None]
"""Id, label, and mask relative to the root."""


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def picture(path: Path, *, spot: int = 0) -> None:
    """Write a black image of 8 x 8 px with a square of 4 x 4 px of grey value `spot`."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:6, 2:6] = spot
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def find(root: Path, layout: str, **settings: Any) -> tuple[dict[str, Category], dict[str, str]]:
    """Return categories by name, and rules of problems by CATEGORY/ID."""
    categories, problems, _ = find_categories(ImagesSettings(root=str(root), layout=layout, **settings))
    return {c.name: c for c in categories}, {p.case_id: p.rule for p in problems}


def listed(root: Path, category: Category) -> list[Listed]:
    return [
        (item.id, bool(item.anomalous), None if item.mask is None else item.mask.relative_to(root).as_posix())
        for item in category.items
    ]


def train(root: Path, layout: str, category: str) -> list[str]:
    """Return the paths of normal training images relative to the root."""
    data = ImagesSettings(root=str(root), layout=layout)
    return [path.relative_to(root).as_posix() for path in normal_training_images(data, category)]


def test_every_layout_name_in_the_settings_has_a_layout() -> None:
    assert set(LAYOUTS) == set(get_args(PublicSetName))
    taken = get_args(ImagesSettings.model_fields["layout"].annotation)
    assert set(taken) == {"auto", "mvtec", "visa", "folder"} | set(LAYOUTS)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_an_error_for_a_wrong_root_is_one_line_with_the_expected_layout(tmp_path: Path, layout: str) -> None:
    touch(tmp_path, "Pictures/1.png", "Pictures/.hidden.png", "readme.txt")
    with pytest.raises(InputError, match=f"no usable image of layout {layout}; expected ") as caught:
        find(tmp_path, layout)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such folder of images"):
        find(tmp_path / "missing", layout)


def test_the_documentation_lists_every_set() -> None:
    text = (Path(__file__).parents[3] / "docs" / "reference" / "file-formats.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")}
    assert set(LAYOUTS) <= rows


def test_mpdd_is_laid_out_as_mvtec_ad(tmp_path: Path) -> None:
    for part in ("tubes", "metal_plate"):
        touch(tmp_path / part, "train/good/000.png", "train/good/.x.png", "test/good/000.png", "test/good/010.png")
        touch(tmp_path / part, "test/anomalous/002.png", "ground_truth/anomalous/002_mask.png")
        touch(tmp_path / part, "test/anomalous/003.png")
    categories, problems = find(tmp_path, "mpdd")
    assert list(categories) == ["metal_plate", "tubes"]
    assert listed(tmp_path, categories["tubes"]) == [
        ("anomalous/002", True, "tubes/ground_truth/anomalous/002_mask.png"),
        ("good/000", False, None),
        ("good/010", False, None),
    ]
    assert set(problems) == {"metal_plate/anomalous/003", "tubes/anomalous/003"}
    assert train(tmp_path, "mpdd", "tubes") == ["tubes/train/good/000.png"]


def test_dtd_synthetic_is_laid_out_as_mvtec_ad(tmp_path: Path) -> None:
    folder = tmp_path / "Woven_001"
    touch(folder, "train/good/000.png", "test/good/000.png", "test/bad/000.png", "ground_truth/bad/000_mask.png")
    categories, problems = find(tmp_path, "dtd_synthetic")
    assert not problems
    assert listed(tmp_path, categories["Woven_001"]) == [
        ("bad/000", True, "Woven_001/ground_truth/bad/000_mask.png"),
        ("good/000", False, None),
    ]


def test_btad(tmp_path: Path) -> None:
    touch(tmp_path, *(f"01/train/ok/{n:04}.bmp" for n in (10, 2)), "01/test/ok/0000.bmp", "01/test/ko/0001.bmp")
    touch(tmp_path, "01/ground_truth/ko/0001.png", "01/test/ko/.0002.bmp", "01/test/ko/0003.bmp")
    touch(tmp_path, "03/test/ok/0000.bmp", "03/test/ko/0001.bmp", "03/ground_truth/ko/0001.bmp")
    categories, problems = find(tmp_path, "btad")
    assert list(categories) == ["01", "03"]
    assert listed(tmp_path, categories["01"]) == [
        ("ko/0001", True, "01/ground_truth/ko/0001.png"),
        ("ok/0000", False, None),
    ]
    assert listed(tmp_path, categories["03"])[0] == ("ko/0001", True, "03/ground_truth/ko/0001.bmp")
    assert list(problems) == ["01/ko/0003"]
    assert train(tmp_path, "btad", "01") == ["01/train/ok/0002.bmp", "01/train/ok/0010.bmp"]
    with pytest.raises(InputError, match=r"no normal training images \(layout btad\)"):
        train(tmp_path, "btad", "03")


def test_labels_of_ksdd_are_black_or_other_masks(tmp_path: Path) -> None:
    touch(tmp_path, *(f"kos{c}/Part{n}.jpg" for c, n in (("10", 0), ("02", 5), ("02", 10), ("02", 7))))
    touch(tmp_path, "kos02/.Part1.jpg", "kos02/notes.txt", "kos02/Part3.JPG")
    picture(tmp_path / "kos10/Part0_label.bmp", spot=1)
    picture(tmp_path / "kos02/Part5_label.bmp")
    picture(tmp_path / "kos02/Part10_label.bmp", spot=255)
    touch(tmp_path, "kos02/Part3_label.bmp")  # a damaged file
    categories, problems = find(tmp_path, "ksdd")
    assert listed(tmp_path, categories["electrical commutators"]) == [
        ("kos02/Part5", False, None),
        ("kos02/Part10", True, "kos02/Part10_label.bmp"),
        ("kos10/Part0", True, "kos10/Part0_label.bmp"),
    ]
    assert {item.defect for item in categories["electrical commutators"].items} == {"good", "crack"}
    assert set(problems) == {"electrical commutators/kos02/Part3", "electrical commutators/kos02/Part7"}
    assert problems["electrical commutators/kos02/Part7"] == "without a label: no Part7_label.* next to it"
    assert problems["electrical commutators/kos02/Part3"].startswith("without a label: Part3_label.bmp ")
    with pytest.raises(InputError, match="no normal training images"):
        train(tmp_path, "ksdd", "electrical commutators")


def test_ksdd_and_headct_in_mvtecs_layout(tmp_path: Path) -> None:
    touch(tmp_path / "a", "electrical commutators/test/good/1.png", "electrical commutators/test/bad/2.png")
    touch(tmp_path / "a", "electrical commutators/ground_truth/bad/2.png", "electrical commutators/train/good/0.png")
    categories, _ = find(tmp_path / "a", "ksdd")
    assert listed(tmp_path, categories["electrical commutators"])[0] == (
        "bad/2",
        True,
        "a/electrical commutators/ground_truth/bad/2.png",
    )
    assert train(tmp_path / "a", "ksdd", "electrical commutators") == ["electrical commutators/train/good/0.png"]
    touch(tmp_path / "b", "brain/test/good/1.png", "brain/test/hemorrhage/2.png")
    categories, problems = find(tmp_path / "b", "headct")
    assert not problems
    assert listed(tmp_path, categories["brain"]) == [("good/1", False, None), ("hemorrhage/2", True, None)]


def dagm(root: Path) -> None:
    for part in ("Train", "Test"):
        touch(root / "Class1" / part, *(f"{n:04}.PNG" for n in (9, 10, 11, 100)), ".0012.PNG", "Label/Labels.txt")
        touch(root / "Class1" / part, "Label/0010_label.PNG", "Label/._0009_label.PNG")
    touch(root, "Class10/Test/0001.PNG", "Class10/Test/Label/0001_label.PNG", "Class2/Test/0001.PNG", "Classes.txt")
    for part in ("Train", "Test"):
        (root / "Class1" / part / "Label/Labels.txt").write_text(
            "1\n9\t0\t0009.PNG\t0\t0\n10\t1\t0010.PNG\t1\t0010_label.PNG\n11\t1\t0011.PNG\t1\t0011_label.PNG\n"
            "100\t0\t0100.PNG\t0\t0\n101\t0\t0101.PNG\t0\t0\n",
            encoding="utf-8",
        )


def test_dagm_has_a_mask_for_each_defect_and_a_list_of_those_it_should_have(tmp_path: Path) -> None:
    dagm(tmp_path)
    categories, problems = find(tmp_path, "dagm")
    assert list(categories) == ["Class1", "Class10"]
    assert listed(tmp_path, categories["Class1"]) == [
        ("0009", False, None),
        ("0010", True, "Class1/Test/Label/0010_label.PNG"),
        ("0100", False, None),
    ]
    # without the list the masks are the labels
    assert listed(tmp_path, categories["Class10"]) == [("0001", True, "Class10/Test/Label/0001_label.PNG")]
    assert problems == {
        "Class1/0011": "anomalous, but without a mask: no 0011_label.* in Label/",
        "Class1/0101": "listed in Labels.txt, but the file is missing",
        "Class2": "no folder Label/, which defines the labels",
    }
    # an anomalous image, with or without its mask, is not a normal training image
    assert train(tmp_path, "dagm", "Class1") == ["Class1/Train/0009.PNG", "Class1/Train/0100.PNG"]
    with pytest.raises(InputError, match="no normal training images"):
        train(tmp_path, "dagm", "Class10")


def test_one_class_of_dagm_and_a_folder_around_it(tmp_path: Path) -> None:
    dagm(tmp_path / "DAGM_KaggleUpload")
    assert list(find(tmp_path, "dagm", categories=("Class1",))[0]) == ["Class1"]
    assert list(find(tmp_path / "DAGM_KaggleUpload/Class1", "dagm")[0]) == ["Class1"]
    assert list(find(tmp_path / "DAGM_KaggleUpload/Class1", "dagm", category="texture")[0]) == ["texture"]
    with pytest.raises(InputError, match="no category Class3; the set has Class1, Class2, Class10"):
        find(tmp_path, "dagm", categories=("Class3",))
    with pytest.raises(ConfigError, match="several categories"):
        find(tmp_path, "dagm", category="texture")


def test_a_list_without_a_label_is_one_line(tmp_path: Path) -> None:
    dagm(tmp_path)
    (tmp_path / "Class1/Test/Label/Labels.txt").write_text("nothing to see here at all\n\x00\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"Labels\.txt: has no row with an image and the label 0 or 1"):
        find(tmp_path, "dagm")


ISIC = "ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"


@pytest.mark.parametrize(
    ("layout", "category", "defect", "images", "masks"),
    [
        ("isic", "skin", "lesion", f"{ISIC[0]}/ISIC_{{}}.jpg", f"{ISIC[1]}/ISIC_{{}}_Segmentation.png"),
        ("isic", "skin", "lesion", "skin/test/any/ISIC_{}.jpg", f"skin/{ISIC[1]}/ISIC_{{}}_Segmentation.png"),
        ("colondb", "colon", "polyp", "images/{}.png", "masks/{}.png"),
        ("clinicdb", "colon", "polyp", "images/{}.png", "masks/{}.png"),
        ("clinicdb", "colon", "polyp", "CVC-ClinicDB/Original/{}.tif", "CVC-ClinicDB/Ground Truth/{}.tif"),
        ("kvasir", "colon", "polyp", "images/{}.png", "masks/{}.png"),
        ("kvasir", "colon", "polyp", "Kvasir-SEG/images/{}.jpg", "Kvasir-SEG/masks/{}.jpg"),
        ("endo", "colon", "polyp", "images/{}.jpg", "masks/{}.jpg"),
        ("tn3k", "thyroid", "nodule", "test-image/{}.jpg", "test-mask/{}.jpg"),
    ],
)
def test_sets_in_which_every_image_is_anomalous(
    tmp_path: Path, layout: str, category: str, defect: str, images: str, masks: str
) -> None:
    for number in ("10", "9", "11"):
        touch(tmp_path, images.format(number))
    folder, name = images.rsplit("/", 1)
    touch(tmp_path, masks.format("9"), masks.format("10"), f"{folder}/.{name.format('12')}", f"{folder}/Thumbs.db")
    categories, problems = find(tmp_path, layout)
    assert list(categories) == [category]
    assert [(anomalous, mask) for _, anomalous, mask in listed(tmp_path, categories[category])] == [
        (True, masks.format("9")),
        (True, masks.format("10")),
    ]
    assert {item.defect for item in categories[category].items} == {defect}
    (problem,) = problems.items()
    assert problem[0].endswith("11")
    assert problem[1].startswith("anomalous, but without a mask: no ")
    assert list(find(tmp_path, layout, category="other words")[0]) == ["other words"]
    with pytest.raises(InputError, match="no normal training images"):
        train(tmp_path, layout, category)


def test_without_any_mask_such_a_set_is_of_no_use(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    with pytest.raises(InputError, match="the first of 2 problems: anomalous, but without a mask"):
        find(tmp_path, "kvasir")


def test_clinicdbs_copies_in_png_are_read_alone(tmp_path: Path) -> None:
    for kind, ending in (("PNG", "png"), ("TIF", "tif")):
        touch(tmp_path, f"{kind}/Original/1.{ending}", f"{kind}/Ground Truth/1.{ending}")
    assert listed(tmp_path, find(tmp_path, "clinicdb")[0]["colon"]) == [("Original/1", True, "PNG/Ground Truth/1.png")]


def test_compression_artifacts_of_a_jpeg_mask_are_not_anomalous(tmp_path: Path) -> None:
    picture(tmp_path / "masks/1.jpg", spot=255)
    with Image.open(tmp_path / "masks/1.jpg") as raw:
        values = np.asarray(raw)
    truth = np.zeros((8, 8), bool)
    truth[2:6, 2:6] = True
    assert (values[~truth] > 0).any()  # otherwise the test checks nothing
    np.testing.assert_array_equal(read_mask(tmp_path / "masks/1.jpg", (8, 8)), truth)


def test_labels_of_headct_come_from_its_list(tmp_path: Path) -> None:
    touch(tmp_path, *(f"head_ct/head_ct/{n:03}.png" for n in (0, 1, 2, 10, 11)), "head_ct/head_ct/.001.png")
    (tmp_path / "labels.csv").write_text("id, hemorrhage\n0,1\n1, 0\n2,1\n10,0\n12,0\n", encoding="utf-8")
    categories, problems = find(tmp_path, "headct")
    at = "head_ct/head_ct"
    assert listed(tmp_path, categories["brain"]) == [
        (f"{at}/000", True, None),
        (f"{at}/001", False, None),
        (f"{at}/002", True, None),
        (f"{at}/010", False, None),
    ]
    assert problems == {
        "brain/12": "listed in labels.csv, but the file is missing",
        f"brain/{at}/011": "without a label: labels.csv does not name it",
    }
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(InputError, match="no usable image of layout headct"):
        find(tmp_path, "headct")


@pytest.mark.parametrize(("layout", "inside"), [("brainmri", ""), ("brainmri", "brain_tumor_dataset/"), ("br35h", "")])
def test_brain_mri_by_folder(tmp_path: Path, layout: str, inside: str) -> None:
    touch(tmp_path, *(f"{inside}{name}" for name in ("no/10 no.jpg", "no/2 no.jpeg", "yes/Y1.jpg", "yes/.Y2.jpg")))
    touch(tmp_path, "pred/pred0.jpg", "Br35H-Mask-RCNN/TRAIN/y1.jpg")
    categories, problems = find(tmp_path, layout)
    assert not problems
    assert listed(tmp_path, categories["brain"]) == [
        ("no/2 no", False, None),
        ("no/10 no", False, None),
        ("yes/Y1", True, None),
    ]
    with pytest.raises(InputError, match="no normal training images"):
        train(tmp_path, layout, "brain")


def test_the_second_copy_in_brain_mris_archive_is_not_read(tmp_path: Path) -> None:
    for inside in ("", "brain_tumor_dataset/"):
        touch(tmp_path, f"{inside}no/1.jpg", f"{inside}yes/2.jpg")
    assert [i.id for i in find(tmp_path, "brainmri")[0]["brain"].items] == ["no/1", "yes/2"]


@pytest.mark.parametrize(
    ("normal", "anomalous"),
    [
        ("Normal/images/Normal-{}.png", "COVID/images/COVID-{}.png"),
        ("NORMAL/NORMAL ({}).png", "COVID/COVID ({}).png"),
        ("NORMAL/NORMAL ({}).png", "COVID-19/COVID-19 ({}).png"),
    ],
)
@pytest.mark.parametrize("inside", ["", "COVID-19_Radiography_Dataset/"])
def test_covid_against_normal(tmp_path: Path, inside: str, normal: str, anomalous: str) -> None:
    root = tmp_path / inside
    touch(root, *(normal.format(n) for n in (10, 2)), anomalous.format(1), "Viral Pneumonia/images/1.png")
    # these masks show lungs, not defects
    touch(
        root, "COVID/masks/COVID-1.png", "Normal/masks/Normal-2.png", "Lung_Opacity/images/1.png", "Lung_Opacity/2.png"
    )
    categories, problems = find(tmp_path, "covid19")
    assert not problems
    found = [(item.path.relative_to(root).as_posix(), item.anomalous, item.mask) for item in categories["chest"].items]
    expected = [(anomalous.format(1), True, None), *((normal.format(n), False, None) for n in (2, 10))]
    assert found == expected


def test_pseudonyms_hide_names_of_public_sets(tmp_path: Path) -> None:
    touch(tmp_path, "images/secret1.png", "images/secret2.png", "masks/secret1.png")
    categories, problems = find(tmp_path, "kvasir", pseudonyms=True)
    assert "secret" not in str([(i.id, i.defect) for i in categories["colon"].items]) + str(problems)
    assert [item.defect for item in categories["colon"].items] == ["anomalous"]
    assert list(problems.values()) == ["anomalous, but without a mask"]


def test_normal_training_images_of_mvtec_visa_and_folders(tmp_path: Path) -> None:
    bottle, candle, nuts = tmp_path / "mvtec/bottle", tmp_path / "visa/candle", tmp_path / "nuts"
    touch(bottle, "train/good/10.png", "train/good/2.png", "train/good/.3.png", "test/good/1.png", "train/odd/1.png")
    assert train(tmp_path / "mvtec", "auto", "bottle") == ["bottle/train/good/2.png", "bottle/train/good/10.png"]
    with pytest.raises(InputError, match="no category cable; the set has bottle"):
        train(tmp_path / "mvtec", "auto", "cable")
    touch(candle, *(f"Data/Images/Normal/{n:04}.JPG" for n in (1, 2, 10)), "Data/Images/Anomaly/000.JPG")
    with pytest.raises(InputError, match=r"no normal training images \(layout visa\)"):
        train(tmp_path / "visa", "auto", "candle")
    rows = [f"candle,{part},normal,candle/Data/Images/Normal/{n:04}.JPG," for part, n in
            (("train", 10), ("train", 2), ("test", 1), ("train", 99))]  # fmt: skip
    rows.append("candle,train,anomaly,candle/Data/Images/Anomaly/000.JPG,")
    touch(tmp_path, "visa/split_csv/1cls.csv")
    (tmp_path / "visa/split_csv/1cls.csv").write_text(
        "\n".join(["object,split,label,image,mask", *rows]), encoding="utf-8"
    )
    assert train(tmp_path / "visa", "auto", "candle") == [
        "candle/Data/Images/Normal/0002.JPG",
        "candle/Data/Images/Normal/0010.JPG",
    ]
    touch(nuts, "good/1.png", "bad/1.png")
    with pytest.raises(InputError, match=r"no normal training images \(layout folder\)"):
        train(nuts, "folder", "nuts")
