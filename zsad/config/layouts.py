"""Where public sets keep their images, labels and masks: AnomalyCLIP's evaluation (001, tables 1 and 2) as data.

A new set is one more entry of `LAYOUTS`. Each set has the layout its publisher ships and, where they differ, the one
that the preparation scripts of 001's public code expect; the first that fits a folder is taken.
`zsad.data.public_sets` reads.
Categories are called as in those scripts, since their names go into prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PublicSetName = Literal[
    "mpdd", "btad", "dtd_synthetic", "ksdd", "dagm",
    "isic", "colondb", "clinicdb", "kvasir", "endo", "tn3k",
    "headct", "brainmri", "br35h", "covid19",
]  # fmt: skip
"""Sets that `data.layout` knows by name."""

MVTEC: Literal["mvtec"] = "mvtec"
"""In the place of a declaration: the layout of MVTec AD."""
MVTEC_DESCRIPTION = "CATEGORY/test/good/x.png, test/DEFECT/x.png, ground_truth/DEFECT/x_mask.png"
NEXT_TO_IMAGE = "NEXT_TO_IMAGE"
"""As a folder of masks: the image's own."""


@dataclass(frozen=True)
class LabelList:
    """A text file with a row an image, columns set apart by commas or blanks."""

    file: str
    image_column: int
    """From 0: the image's number or file name."""
    anomalous_column: int
    """From 0: 0 or 1. Rows with anything else in it are headings."""


@dataclass(frozen=True)
class Layout:
    """A set's folders and names. Paths and patterns are relative to `test` (or `train`) in the category's folder.

    Every visible file with an image's ending, in any case of letters, that a pattern finds is an image.
    """

    description: str
    """The layout in one line, for people."""
    defect: str
    """What an anomalous image shows, in one word."""
    category: str = ""
    """Name of the set's only category. Empty: each folder that `categories` finds is one, by its own name."""
    categories: str = ""
    base_folders: tuple[str, ...] = (".",)
    """Where below the root the set may begin: archives bring a folder or two of their own."""
    test: str = "."
    train: str | None = None
    """None: the set has no training images; all its images are test images."""
    normal: tuple[str, ...] = ()
    anomalous: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    """Images of both kinds in one folder; `labels_from` tells them apart."""
    labels_from: Literal["mask", "mask_pixels", "list"] = "mask"
    """Anomalous is an image that has a mask; whose mask is not black; that the list says is."""
    labels: LabelList | None = None
    """With `labels_from` mask it only says which masks there must be, and may be missing."""
    masks: str | None = None
    """Folder of the masks, or `NEXT_TO_IMAGE`. None: the set has none, labels are for whole images alone."""
    mask_suffix: str = ""
    """What follows the image's stem in its mask's."""

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.normal + self.anomalous + self.mixed


def _polyp_layout(*base_folders: str) -> Layout:
    """Images and masks of the same names in two folders; every image shows a polyp."""
    return Layout(
        description="images/x.png with masks/x.png",
        defect="polyp",
        category="colon",
        base_folders=(".", *base_folders),
        anomalous=("images/*",),
        masks="masks",
    )


def _brain_layout(*base_folders: str) -> Layout:
    """Brain MRI: a tumour or none, by folder. `pred` and `Br35H-Mask-RCNN` of Br35H's archive have no such label."""
    return Layout(
        description="no/x.jpg (normal) and yes/x.jpg (tumour)",
        defect="tumour",
        category="brain",
        base_folders=(".", *base_folders),
        normal=("no/*",),
        anomalous=("yes/*",),
    )


LAYOUTS: dict[PublicSetName, tuple[Layout | Literal["mvtec"], ...]] = {
    "mpdd": (MVTEC,),
    # normal images in test/ok, defects in test/ko, masks of the same stems, .png or .bmp: all known to layout mvtec
    "btad": (MVTEC,),
    "dtd_synthetic": (MVTEC,),
    # 50 commutators of 8 pictures, no split of images but three folds of commutators: all are test images
    "ksdd": (
        Layout(
            description="kos01/Part0.jpg with kos01/Part0_label.bmp, black where normal",
            defect="crack",
            category="electrical commutators",
            base_folders=(".", "KolektorSDD"),
            mixed=("kos*/*",),
            labels_from="mask_pixels",
            masks=NEXT_TO_IMAGE,
            mask_suffix="_label",
        ),
        MVTEC,  # as the public code of 001 has it
    ),
    # Label/ has a mask for each defect and Labels.txt: number, 0 or 1, image, a number, mask. The columns are known
    # from programs that read them and not from the publisher, hence only used to miss masks
    "dagm": (
        Layout(
            description="Class1/Test/0001.PNG, with Class1/Test/Label/0001_label.PNG if defective; normal: Train",
            defect="defect",
            categories="Class*",
            base_folders=(".", "DAGM_KaggleUpload"),
            test="Test",
            train="Train",
            mixed=("*",),
            labels_from="mask",
            labels=LabelList("Label/Labels.txt", image_column=2, anomalous_column=1),
            masks="Label",
            mask_suffix="_label",
        ),
    ),
    # ISIC 2016, part 1, test data (379 images): two archives side by side
    "isic": (
        Layout(
            description="ISBI2016_ISIC_Part1_Test_Data/x.jpg, ISBI2016_ISIC_Part1_Test_GroundTruth/x_Segmentation.png",
            defect="lesion",
            category="skin",
            anomalous=("ISBI2016_ISIC_Part1_Test_Data/*",),
            masks="ISBI2016_ISIC_Part1_Test_GroundTruth",
            mask_suffix="_Segmentation",
        ),
        Layout(  # as the public code of 001 has it
            description="skin/test/FOLDER/x.jpg with skin/ISBI2016_ISIC_Part1_Test_GroundTruth/x_Segmentation.png",
            defect="lesion",
            category="skin",
            base_folders=("skin", "."),
            anomalous=("test/*/*",),
            masks="ISBI2016_ISIC_Part1_Test_GroundTruth",
            mask_suffix="_Segmentation",
        ),
    ),
    # from the collection of polyp sets (figshare 21221579), PNG throughout
    "colondb": (_polyp_layout("CVC-ColonDB"),),
    "clinicdb": (
        _polyp_layout("CVC-ClinicDB"),
        Layout(  # the publisher's own archive: TIFF, and copies as PNG, which are taken where there are both
            description="Original/1.tif with Ground Truth/1.tif, in PNG/ or TIF/ if there",
            defect="polyp",
            category="colon",
            base_folders=("PNG", "TIF", ".", "CVC-ClinicDB/PNG", "CVC-ClinicDB/TIF", "CVC-ClinicDB"),
            anomalous=("Original/*",),
            masks="Ground Truth",
        ),
    ),
    # 001 tests the 100 images of the polyp collection; Kvasir-SEG itself has 1,000, images and masks in JPEG
    "kvasir": (_polyp_layout("Kvasir", "Kvasir-SEG"),),
    # EndoTect 2020's test set of segmentation, in JPEG
    "endo": (_polyp_layout("EndoTect_2020_Segmentation_Test_Dataset"),),
    # test-mask/ is JPEG too; trainval-image/ has no normal images either and is not read
    "tn3k": (
        Layout(
            description="test-image/0000.jpg with test-mask/0000.jpg",
            defect="nodule",
            category="thyroid",
            base_folders=(".", "tn3k", "Thyroid Dataset/tn3k"),
            anomalous=("test-image/*",),
            masks="test-mask",
        ),
    ),
    "headct": (
        Layout(
            description="head_ct/head_ct/000.png with labels.csv (id, hemorrhage)",
            defect="haemorrhage",
            category="brain",
            base_folders=(".", "head_ct"),
            mixed=("head_ct/head_ct/*", "head_ct/*"),
            labels_from="list",
            labels=LabelList("labels.csv", image_column=0, anomalous_column=1),
        ),
        MVTEC,  # as the public code of 001 has it: brain/test/good and others
    ),
    # the archive holds everything twice, once in brain_tumor_dataset/: only one of them is read
    "brainmri": (_brain_layout("brain_tumor_dataset"),),
    "br35h": (_brain_layout(),),
    # COVID-19 against normal; the set's lung opacities and viral pneumonias are left out, and its masks show lungs.
    # Releases differ: COVID/images and Normal/images now (3,616 + 10,192), COVID-19 and NORMAL without images/ at first
    # (219 + 1,341). 001 must have had the first, without pneumonias: an AP of 8.5 % (table 2) is below what even the
    # worst ranking has with a fourth of all images anomalous
    "covid19": (
        Layout(
            description="Normal/images/x.png and COVID/images/x.png, or NORMAL/x.png and COVID/x.png or COVID-19/x.png",
            defect="covid",
            category="chest",
            base_folders=(".", "COVID-19_Radiography_Dataset", "COVID-19 Radiography Database"),
            normal=("Normal/images/*", "NORMAL/*"),
            anomalous=("COVID/images/*", "COVID/*", "COVID-19/*"),
        ),
    ),
}


def describe_layouts(name: PublicSetName) -> str:
    """The layouts that a set may have, in one line."""
    return "; or ".join(MVTEC_DESCRIPTION if layout == MVTEC else layout.description for layout in LAYOUTS[name])
